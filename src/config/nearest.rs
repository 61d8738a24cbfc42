//! The word that was probably meant.

/// Index of the candidate nearest to `word`, if one is near: the same but for case and `-` for
/// `_`, a misspelling, or the word cut short.
pub(super) fn nearest(word: &str, candidates: &[&str]) -> Option<usize> {
    // Past this length it is no misspelling, and comparing would take its square in time.
    const LONGEST: usize = 64;
    if word.is_empty() || word.len() > LONGEST {
        return None;
    }
    let plain = |word: &str| word.to_ascii_lowercase().replace('-', "_");
    let word = plain(word);
    let scores = candidates.iter().enumerate().map(|(index, candidate)| {
        let candidate = plain(candidate);
        let letters = word.chars().count().max(candidate.chars().count());
        let misspelled = strsim::osa_distance(&word, &candidate) <= letters / 3;
        let cut = word.len() >= 3 && candidate.starts_with(&word);
        let score = strsim::jaro_winkler(&word, &candidate);
        (index, if misspelled || cut { score } else { 0.0 })
    });
    scores
        .filter(|(_, score)| *score > 0.0)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(word: &str) -> Option<&'static str> {
        let keys = ["path", "format", "ro", "root", "o_direct", "block_size"];
        nearest(word, &keys).map(|index| keys[index])
    }

    #[test]
    fn kebab_case_is_the_same_word() {
        assert_eq!(near("o-direct"), Some("o_direct"));
        assert_eq!(near("Block-Size"), Some("block_size"));
    }

    #[test]
    fn a_misspelling_is_near() {
        assert_eq!(near("fromat"), Some("format"));
        assert_eq!(near("paht"), Some("path"));
        assert_eq!(near("rot"), Some("root"));
    }

    #[test]
    fn a_word_cut_short_is_near() {
        assert_eq!(near("form"), Some("format"));
        assert_eq!(near("block"), Some("block_size"));
    }

    #[test]
    fn another_word_is_not_near() {
        assert_eq!(near("serial"), None);
        assert_eq!(near("x"), None);
        assert_eq!(near(""), None);
        assert_eq!(near(&"o".repeat(1 << 20)), None);
    }
}
