//! Sizes as people write and read them. Every unit is binary.

/// Names of the units with the power of two that each stands for.
const UNITS: [(&str, &str, u32); 4] = [
    ("KiB", "K", 10),
    ("MiB", "M", 20),
    ("GiB", "G", 30),
    ("TiB", "T", 40),
];

/// Reads a size: a number of bytes, or a whole number with KiB, MiB, GiB, TiB or K, M, G, T, all
/// binary.
///
/// The error says what would help.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match UNITS
        .iter()
        .find(|(long, short, _)| unit == *long || unit == *short)
    {
        Some((_, _, shift)) => *shift,
        None if unit.is_empty() => 0,
        None => return Err(advice(number, unit)),
    };
    let number: u64 = match number.parse() {
        Ok(number) => number,
        Err(_) if number.is_empty() => return Err(advice(number, unit)),
        Err(_) => return Err("it does not fit in 64 bits".to_owned()),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "it does not fit in 64 bits".to_owned())
}

fn advice(number: &str, unit: &str) -> String {
    let plain = unit.trim().to_ascii_lowercase();
    let meant = UNITS.iter().find(|(long, short, _)| {
        let (long, short) = (long.to_ascii_lowercase(), short.to_ascii_lowercase());
        plain == long || plain == short || plain == format!("{short}b")
    });
    match meant {
        Some((long, _, _)) if !number.is_empty() => format!("write \"{number}{long}\""),
        _ => "write bytes, or a whole number with KiB, MiB, GiB or TiB".to_owned(),
    }
}

/// Writes a size with the largest unit that leaves a whole number.
pub fn show(bytes: u64) -> String {
    let unit = UNITS.iter().rev();
    let mut whole = unit.filter(|(_, _, shift)| bytes != 0 && bytes.is_multiple_of(1 << shift));
    match whole.next() {
        Some((long, _, shift)) => format!("{}{long}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_number_is_bytes() {
        assert_eq!(parse("65536"), Ok(65536));
        assert_eq!(parse("0"), Ok(0));
    }

    #[test]
    fn units_are_binary() {
        assert_eq!(parse("64KiB"), Ok(64 << 10));
        assert_eq!(parse("64K"), Ok(64 << 10));
        assert_eq!(parse("512MiB"), Ok(512 << 20));
        assert_eq!(parse("8G"), Ok(8 << 30));
        assert_eq!(parse("1TiB"), Ok(1 << 40));
    }

    #[test]
    fn a_near_miss_is_told_how_to_write_it() {
        assert_eq!(parse("4GB"), Err("write \"4GiB\"".into()));
        assert_eq!(parse("4 gib"), Err("write \"4GiB\"".into()));
        assert_eq!(parse("512m"), Err("write \"512MiB\"".into()));
    }

    #[test]
    fn what_is_no_size_is_told_the_units() {
        for text in [
            "", "MiB", "1.5GiB", "-1", "1e9", "five", "1PiB", "１KiB", "\0",
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(
                error,
                "write bytes, or a whole number with KiB, MiB, GiB or TiB"
            );
        }
    }

    #[test]
    fn a_size_past_64_bits_is_an_error() {
        assert_eq!(parse("16777215TiB"), Ok(0xffffff << 40));
        assert_eq!(
            parse("16777216TiB"),
            Err("it does not fit in 64 bits".into())
        );
        assert!(parse(&"9".repeat(1000)).is_err());
    }

    #[test]
    fn a_size_is_shown_in_its_largest_whole_unit() {
        assert_eq!(show(512 << 20), "512MiB");
        assert_eq!(show(1536 << 20), "1536MiB");
        assert_eq!(show(1 << 40), "1TiB");
        assert_eq!(show(1000), "1000 bytes");
        assert_eq!(show(0), "0 bytes");
    }
}
