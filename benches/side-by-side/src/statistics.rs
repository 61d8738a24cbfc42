//! Of several rounds, one figure and how far the rounds were from it.

/// The median, and the least and the greatest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// Half of the rounds were at most this.
    pub median: f64,
    /// The least round.
    pub least: f64,
    /// The greatest round.
    pub greatest: f64,
}

impl Spread {
    /// Of some figures; zeroes if there is none.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Spread {
        let mut figures: Vec<_> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        let (Some(least), Some(greatest)) = (figures.first(), figures.last()) else {
            return Spread::default();
        };
        let middle = figures.len() / 2;
        Spread {
            median: (figures[(figures.len() - 1) / 2] + figures[middle]) / 2.0,
            least: *least,
            greatest: *greatest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]);
        assert_eq!(
            (spread.median, spread.least, spread.greatest),
            (2.5, 1.0, 4.0)
        );
        assert_eq!(Spread::of([7.0, 1.0, 2.0]).median, 2.0);
        assert_eq!(Spread::of([]), Spread::default());
    }
}
