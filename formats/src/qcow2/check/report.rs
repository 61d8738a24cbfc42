//! What a check found.

use std::fmt;

/// How many problems a report describes; the others are only counted.
const MAX_PROBLEMS: usize = 100;

/// What a check found, counted as `qemu-img check` does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong and may have damaged data, or will when the image is written to.
    pub corruptions: u64,
    /// Clusters that nothing uses, or that more users are counted for than there are: space is
    /// lost, nothing else.
    pub leaks: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// Clusters of metadata that something else claims too, whatever their refcounts are: to
    /// write to one is to damage the other. `qemu-img check` does not count them.
    pub overlaps: u64,
    /// Corruptions that a repair mended.
    pub corruptions_fixed: u64,
    /// Leaks that a repair freed.
    pub leaks_fixed: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters of the disk that have a place in the image.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not lie behind the one before them.
    pub fragmented_clusters: u64,
    /// Allocated clusters that are compressed.
    pub compressed_clusters: u64,
    /// Offset of the end of the last cluster in use.
    pub image_end_offset: u64,
    /// The first of what was found, for a person to read.
    pub problems: Vec<Problem>,
    /// How many more there are.
    pub more_problems: u64,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// How bad it is.
    pub kind: ProblemKind,
    /// What it is and where: lower case, one line.
    pub what: String,
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemKind {
    /// Counted in [`Report::corruptions`].
    Corruption,
    /// Counted in [`Report::leaks`].
    Leak,
    /// Counted in [`Report::check_errors`].
    CheckError,
    /// Counted in [`Report::overlaps`].
    Overlap,
}

impl Report {
    /// Whether there is nothing to say.
    pub fn is_clean(&self) -> bool {
        self.is_sound() && self.leaks == 0
    }

    /// Whether nothing is wrong but that space is lost.
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0 && self.overlaps == 0
    }

    /// Counts `count` problems of one kind.
    pub(super) fn add(&mut self, kind: ProblemKind, count: u64, what: impl FnOnce() -> String) {
        let counter = match kind {
            ProblemKind::Corruption => &mut self.corruptions,
            ProblemKind::Leak => &mut self.leaks,
            ProblemKind::CheckError => &mut self.check_errors,
            ProblemKind::Overlap => &mut self.overlaps,
        };
        *counter += count;
        match self.problems.len() < MAX_PROBLEMS {
            true => self.problems.push(Problem { kind, what: what() }),
            false => self.more_problems += 1,
        }
    }

    pub(super) fn corruption(&mut self, what: impl FnOnce() -> String) {
        self.add(ProblemKind::Corruption, 1, what);
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ProblemKind::Corruption => "corruption",
            ProblemKind::Leak => "leak",
            ProblemKind::CheckError => "check error",
            ProblemKind::Overlap => "overlap",
        };
        write!(f, "{kind}: {}", self.what)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            writeln!(f, "{problem}")?;
        }
        if self.more_problems > 0 {
            writeln!(f, "… and {} more", self.more_problems)?;
        }
        if self.corruptions_fixed > 0 || self.leaks_fixed > 0 {
            let (corruptions, leaks) = (self.corruptions_fixed, self.leaks_fixed);
            writeln!(
                f,
                "repaired: {}, {}",
                counted(corruptions, "corruption"),
                counted(leaks, "leaked cluster")
            )?;
        }
        match self.is_clean() {
            true => writeln!(f, "no errors")?,
            false => writeln!(
                f,
                "{}, {}, {}, {}",
                counted(self.corruptions, "corruption"),
                counted(self.overlaps, "overlap"),
                counted(self.leaks, "leaked cluster"),
                counted(self.check_errors, "check error")
            )?,
        }
        let percent = |part: u64, whole: u64| match whole {
            0 => 0.0,
            _ => part as f64 * 100.0 / whole as f64,
        };
        let allocated = self.allocated_clusters;
        writeln!(
            f,
            "{allocated} of {} clusters allocated ({:.2}%), {:.2}% of them fragmented, {:.2}% \
             compressed",
            self.total_clusters,
            percent(allocated, self.total_clusters),
            percent(self.fragmented_clusters, allocated),
            percent(self.compressed_clusters, allocated),
        )?;
        write!(f, "the image ends at {}", self.image_end_offset)
    }
}

fn counted(count: u64, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_one_readable_text() {
        let mut report = Report {
            total_clusters: 16,
            allocated_clusters: 4,
            fragmented_clusters: 1,
            image_end_offset: 655_360,
            ..Report::default()
        };
        assert_eq!(
            report.to_string(),
            "no errors\n4 of 16 clusters allocated (25.00%), 25.00% of them fragmented, 0.00% \
             compressed\nthe image ends at 655360"
        );
        report.corruption(|| "the L1 table is at 0x200".into());
        report.add(ProblemKind::Leak, 2, || "clusters 5 and 6".into());
        report.leaks_fixed = 1;
        let text = report.to_string();
        assert!(text.starts_with(
            "corruption: the L1 table is at 0x200\nleak: clusters 5 and 6\nrepaired: 0 \
             corruptions, 1 leaked cluster\n1 corruption, 0 overlaps, 2 leaked clusters, 0 check errors\n"
        ));
    }

    #[test]
    fn of_many_problems_the_first_are_described_and_all_are_counted() {
        let mut report = Report::default();
        for number in 0..250 {
            report.corruption(|| number.to_string());
        }
        assert_eq!((report.corruptions, report.problems.len()), (250, 100));
        assert!(
            report
                .to_string()
                .contains("corruption: 99\n… and 150 more\n")
        );
    }
}
