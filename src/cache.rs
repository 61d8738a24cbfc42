//! Where `launcher` keeps what it can do without.

use std::path::PathBuf;

/// A folder of this user's cache (XDG Base Directory Specification):
/// `$XDG_CACHE_HOME/launcher/NAME`, by default `~/.cache/launcher/NAME`. It may not be there yet.
///
/// `None` if the user has no home folder.
pub(crate) fn folder(name: &str) -> Option<PathBuf> {
    let named = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    folder_in(named, std::env::home_dir(), name)
}

fn folder_in(named: Option<PathBuf>, home: Option<PathBuf>, name: &str) -> Option<PathBuf> {
    // A relative path is to be taken for none, by the specification.
    let base = named.filter(|path| path.is_absolute()).or_else(|| {
        let home = home.filter(|home| home.is_absolute())?;
        Some(home.join(".cache"))
    })?;
    Some(base.join("launcher").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_environment_says_or_in_the_home_folder() {
        let folder = |named: Option<&str>, home: Option<&str>| {
            folder_in(named.map(Into::into), home.map(Into::into), "files")
        };
        let in_home = Some("/home/a/.cache/launcher/files".into());
        assert_eq!(
            folder(Some("/c"), Some("/home/a")),
            Some("/c/launcher/files".into())
        );
        assert_eq!(folder(None, Some("/home/a")), in_home);
        assert_eq!(folder(Some("c"), Some("/home/a")), in_home);
        assert_eq!(folder(Some(""), Some("/home/a")), in_home);
        assert_eq!(folder(Some("c"), Some("")), None);
        assert_eq!(folder(None, None), None);
    }
}
