//! How the values of a lock file are written: for `#[serde(with = …)]`.

/// A digest as hex digits.
pub(super) mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::digest::Digest;

    pub(in crate::lock) fn serialize<S: Serializer>(
        digest: &Digest,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_str(digest)
    }

    pub(in crate::lock) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Digest, D::Error> {
        let text = String::deserialize(from)?;
        let wrong = |why| D::Error::custom(format!("the digest {text:?} is none: {why}"));
        text.parse().map_err(wrong)
    }
}

/// As [`hex`], for one that may be absent.
pub(super) mod maybe_hex {
    use serde::{Deserializer, Serializer};

    use crate::digest::Digest;

    pub(in crate::lock) fn serialize<S: Serializer>(
        digest: &Option<Digest>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match digest {
            Some(digest) => super::hex::serialize(digest, to),
            None => to.serialize_none(),
        }
    }

    pub(in crate::lock) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Digest>, D::Error> {
        super::hex::deserialize(from).map(Some)
    }
}

/// A size with a unit, where one leaves a whole number.
pub(super) mod bytes {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::config::size;

    pub(in crate::lock) fn serialize<S: Serializer>(bytes: &u64, to: S) -> Result<S::Ok, S::Error> {
        match bytes.is_multiple_of(1024) && *bytes > 0 {
            true => to.serialize_str(&size::show(*bytes)),
            false => to.serialize_str(&bytes.to_string()),
        }
    }

    pub(in crate::lock) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        size::parse(&text).map_err(|why| D::Error::custom(format!("{text:?} is no size: {why}")))
    }
}

/// As [`bytes`], for one that may be absent.
pub(super) mod maybe_bytes {
    use serde::{Deserializer, Serializer};

    pub(in crate::lock) fn serialize<S: Serializer>(
        bytes: &Option<u64>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => super::bytes::serialize(bytes, to),
            None => to.serialize_none(),
        }
    }

    pub(in crate::lock) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<u64>, D::Error> {
        super::bytes::deserialize(from).map(Some)
    }
}
