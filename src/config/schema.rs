//! The JSON schema (draft-07) of a VM's file, for editors: made from the same keys as the reader.

use formats::{Format, FormatOption};
use serde_json::{Map, Value, json};

use super::image_format::shape;
use super::kinds::{FilePath, Id};
use super::options::{Absent, Key, Takes, running};
use super::shape::Shape;
use super::value::Leaf;

/// The schema of a VM's file, in a build with these disk formats.
///
/// It sees less than `launcher check`: not the ranges of sizes written as text, and nothing that
/// concerns several keys.
pub fn schema(formats: &[&Format]) -> Value {
    let mut schema = table(super::KEYS, formats);
    let Value::Object(members) = &mut schema else {
        return schema;
    };
    members.insert(
        "$schema".into(),
        "http://json-schema.org/draft-07/schema#".into(),
    );
    members.insert("title".into(), "A VM of launcher".into());
    // What one file leaves out, those that it extends may have.
    members.insert("if".into(), json!({ "not": { "required": ["extends"] } }));
    members.insert("then".into(), needed(super::KEYS));
    schema
}

/// A table that takes these keys and no others.
fn table(keys: &[Key], formats: &[&Format]) -> Value {
    let properties = keys
        .iter()
        .map(|key| (key.name.to_owned(), property(key, formats)));
    json!({
        "type": "object",
        "additionalProperties": false,
        "properties": properties.collect::<Map<_, _>>(),
    })
}

/// One key: what it takes, does, and is by default.
fn property(key: &Key, formats: &[&Format]) -> Value {
    let mut schema = match key.takes {
        Takes::Value(_, shape) => of_shape(shape, formats),
        Takes::Table(keys) => table(keys, formats),
        Takes::Tables(keys) => {
            let mut items = table(keys, formats);
            if key.name == "block" {
                own_tables(&mut items, formats);
            }
            json!({ "type": "array", "items": items })
        }
        Takes::File(keys) => file(keys, formats),
        Takes::Files(keys) => one_or_more(file(keys, formats)),
        Takes::Profiles => {
            let keys = super::KEYS.iter().filter(|key| key.name != "extends");
            let keys = keys.filter(|key| !matches!(key.takes, Takes::Profiles));
            let keys: Vec<_> = keys.copied().collect();
            json!({ "type": "object", "additionalProperties": table(&keys, formats) })
        }
    };
    let mut description = key.meaning();
    for (word, meaning) in key.words() {
        description += &format!("\n\n\"{word}\": {meaning}");
    }
    if let Takes::Value(_, Shape::Format) = key.takes {
        for format in formats {
            description += &format!("\n\n\"{}\": {}", format.name, running(format.description));
        }
    }
    if let Absent::Words(words) = key.absent {
        description += &format!("\n\nDefault: {words}.");
    }
    let default = match key.absent {
        Absent::Value(value) => value,
        _ => "",
    };
    described(&mut schema, description, default, key.example);
    schema
}

/// Adds what an editor shows of a key; `default` and `example` are TOML, or empty.
fn described(schema: &mut Value, description: String, default: &str, example: &str) {
    schema["description"] = description.into();
    if let Some(default) = of_toml(default) {
        schema["default"] = default;
    }
    if let Some(example) = of_toml(example) {
        schema["examples"] = json!([example]);
    }
}

/// The tables of the formats' own options.
fn own_tables(block: &mut Value, formats: &[&Format]) {
    for format in formats {
        let options = format
            .options
            .iter()
            .map(|option| (option.name.to_owned(), own_option(option, formats)));
        block["properties"][format.name] = json!({
            "type": "object",
            "additionalProperties": false,
            "description": format!("Options of the format \"{}\".", format.name),
            "properties": options.collect::<Map<_, _>>(),
        });
    }
}

fn own_option(option: &FormatOption, formats: &[&Format]) -> Value {
    let mut schema = of_shape(shape(option.kind), formats);
    described(&mut schema, running(option.doc), option.default, "");
    schema
}

/// A path, or a table that says more of a file.
fn file(keys: &[Key], formats: &[&Format]) -> Value {
    let mut table = table(keys, formats);
    if let (Value::Object(table), Value::Object(needed)) = (&mut table, needed(keys)) {
        table.extend(needed);
    }
    json!({ "anyOf": [of_shape(FilePath::SHAPE, formats), table] })
}

fn one_or_more(one: Value) -> Value {
    json!({ "anyOf": [one, { "type": "array", "items": one }] })
}

fn of_shape(shape: Shape, formats: &[&Format]) -> Value {
    const SIZE: &str = "^[0-9]+([KMGT](iB)?)?$";
    match shape {
        Shape::Truth => json!({ "type": "boolean" }),
        Shape::Whole { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Shape::Size { min, max, step } => json!({ "anyOf": [
            { "type": "integer", "minimum": min, "maximum": max, "multipleOf": step },
            { "type": "string", "pattern": SIZE },
        ] }),
        Shape::PowerOfTwo { min, max } => {
            let powers = (0..u64::BITS).map(|shift| 1_u64 << shift);
            let powers: Vec<_> = powers.filter(|it| (min..=max).contains(it)).collect();
            json!({ "anyOf": [{ "enum": powers }, { "type": "string", "pattern": SIZE }] })
        }
        Shape::Text("") => json!({ "type": "string" }),
        Shape::Text(pattern) => json!({ "type": "string", "pattern": pattern }),
        Shape::Words(words) => {
            let words: Vec<_> = words.iter().map(|(word, _)| word).collect();
            json!({ "enum": words })
        }
        Shape::Names(words) => json!({ "enum": words }),
        Shape::Format => {
            let names: Vec<_> = formats.iter().map(|format| format.name).collect();
            json!({ "enum": names })
        }
        Shape::Disk => json!({ "anyOf": [
            { "type": "integer", "minimum": 0 },
            of_shape(Id::SHAPE, formats),
        ] }),
        Shape::OneOrMore(one) => one_or_more(of_shape(*one, formats)),
    }
}

/// That the keys are there which must be, in these tables and those below.
fn needed(keys: &[Key]) -> Value {
    let mut required = Vec::new();
    let mut below = Map::new();
    for key in keys {
        let inner = match key.takes {
            Takes::Value(..) | Takes::File(_) | Takes::Files(_) | Takes::Profiles => Value::Null,
            Takes::Table(keys) | Takes::Tables(keys) => needed(keys),
        };
        let must = matches!(key.absent, Absent::Error(_));
        // A table that is left out lacks what it must have.
        let needs = |what| inner.get(what).is_some();
        let lacks = matches!(key.takes, Takes::Table(_)) && (needs("required") || needs("anyOf"));
        if must || lacks {
            required.push(key.name);
        }
        if inner.as_object().is_some_and(|inner| !inner.is_empty()) {
            let inner = match key.takes {
                Takes::Tables(_) => json!({ "items": inner }),
                _ => inner,
            };
            below.insert(key.name.to_owned(), inner);
        }
    }
    let mut needed = Map::new();
    if !required.is_empty() {
        needed.insert("required".into(), required.into());
    }
    if !below.is_empty() {
        needed.insert("properties".into(), below.into());
    }
    let has = |name: &str| keys.iter().any(|key| key.name == name);
    for others in [
        &["path", "url", "vhost_user"][..],
        &["kernel", "from_block"],
    ] {
        let there: Vec<_> = others.iter().filter(|name| has(name)).collect();
        if there.len() > 1 {
            let one_of_them = there.into_iter().map(|name| json!({ "required": [name] }));
            needed.insert("anyOf".into(), one_of_them.collect());
        }
    }
    needed.into()
}

/// A value written as TOML; `None` if nothing is written.
fn of_toml(value: &str) -> Option<Value> {
    let table: toml::Table = format!("value = {value}").parse().ok()?;
    serde_json::to_value(table.get("value")?).ok()
}
