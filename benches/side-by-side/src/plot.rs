//! The ratios as a picture: SVG, readable on light and on dark ground.

use crate::host::Host;
use crate::measure::Row;

const WIDTH: f64 = 860.0;
/// Where bars begin and end.
const LEFT: f64 = 230.0;
const RIGHT: f64 = 720.0;
const TOP: f64 = 92.0;
const LINE: f64 = 22.0;

const STYLE: &str = "
.ground{fill:#fff}.text{fill:#1f2328}.faint{fill:#59636e}.grid{stroke:#d1d9e0}.one{stroke:#1f2328}
.met{fill:#1f77b4}.missed{fill:#d9630f}.free{fill:#8c959f}.mark{stroke:#1f2328}
text{font:12px system-ui,sans-serif}.title{font-size:15px;font-weight:600}.end{text-anchor:end}.middle{text-anchor:middle}
@media(prefers-color-scheme:dark){
.ground{fill:#0d1117}.text{fill:#f0f6fc}.faint{fill:#9198a1}.grid{stroke:#30363d}.one{stroke:#f0f6fc}
.met{fill:#4c9be8}.missed{fill:#f0883e}.free{fill:#6e7681}.mark{stroke:#f0f6fc}}
";

/// The picture: a bar for each row from 1.0, by a logarithmic scale.
pub fn svg(host: &Host, rows: &[Row]) -> String {
    let height = TOP + LINE * rows.len() as f64 + 44.0;
    let scale = Scale::of(rows);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n<title>launcher disk serve against \
         qemu-storage-daemon</title>\n<style>{STYLE}</style>\n\
         <rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\"/>\n"
    );
    let mut text = |x: f64, y: f64, class: &str, what: &str| {
        let what = escaped(what);
        out += &format!("<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{what}</text>\n");
    };
    text(
        16.0,
        26.0,
        "text title",
        "launcher disk serve: requests a second, as a multiple of the better qemu-storage-daemon",
    );
    text(
        16.0,
        45.0,
        "faint",
        &format!("{}; load before: {}", host.machine, host.load),
    );
    let legend = TOP - 27.0;
    text(32.0, legend, "text", "bar met");
    text(116.0, legend, "text", "bar missed");
    text(220.0, legend, "text", "no bar");
    text(302.0, legend, "text", "what it must reach");
    text(446.0, legend, "text", "least and greatest round");
    for (number, row) in rows.iter().enumerate() {
        let y = TOP + LINE * number as f64 + 15.0;
        text(LEFT - 10.0, y, "text end", &row.case.to_string());
        let ratio = row.ratio();
        let at = scale.x(ratio.greatest.max(ratio.median)).max(scale.x(1.0));
        let at = at.max(row.case.bar().map_or(0.0, |bar| scale.x(bar)));
        text(at + 7.0, y, "text", &format!("{:.2}", ratio.median));
    }
    let bottom = TOP + LINE * rows.len() as f64;
    for tick in scale.ticks() {
        let times = match tick < 1.0 {
            true => format!("1/{}x", 1.0 / tick),
            false => format!("{tick}x"),
        };
        text(scale.x(tick), bottom + 18.0, "faint middle", &times);
    }
    text(
        LEFT,
        bottom + 36.0,
        "faint",
        "left of 1x: slower than QEMU; right of it: faster. d: in flight; warm: page cache; direct: O_DIRECT",
    );
    let mark = |class: &str, x: f64| {
        let y = legend - 9.0;
        format!("<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"11\" height=\"10\"/>\n")
    };
    out += &(mark("met", 16.0) + &mark("missed", 100.0) + &mark("free", 204.0));
    out += &line("mark", (294.0, legend - 11.0), (294.0, legend + 3.0), 2.5);
    out += &line("mark", (424.0, legend - 4.0), (440.0, legend - 4.0), 1.0);
    for tick in scale.ticks() {
        let (class, width) = if tick == 1.0 {
            ("one", 1.5)
        } else {
            ("grid", 1.0)
        };
        let x = scale.x(tick);
        out += &line(class, (x, TOP), (x, bottom + 4.0), width);
    }
    for (number, row) in rows.iter().enumerate() {
        let y = TOP + LINE * number as f64;
        let class = match row.verdict() {
            (None, _) => "free",
            (_, true) => "met",
            (_, false) => "missed",
        };
        let ratio = row.ratio();
        let (one, end) = (scale.x(1.0), scale.x(ratio.median));
        let (from, wide) = (one.min(end), (end - one).abs());
        out += &format!(
            "<rect class=\"{class}\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{wide:.1}\" height=\"14\"/>\n",
            y + 4.0
        );
        let (least, greatest) = (scale.x(ratio.least), scale.x(ratio.greatest));
        out += &line("mark", (least, y + 11.0), (greatest, y + 11.0), 1.0);
        if let Some(bar) = row.case.bar() {
            let x = scale.x(bar);
            out += &line("mark", (x, y + 2.0), (x, y + 20.0), 2.5);
        }
    }
    out + "</svg>\n"
}

fn line(class: &str, from: (f64, f64), to: (f64, f64), width: f64) -> String {
    format!(
        "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" \
         stroke-width=\"{width}\"/>\n",
        from.0, from.1, to.0, to.1
    )
}

fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;");
    text.replace('<', "&lt;").replace('>', "&gt;")
}

/// From ratios to places: each power of two is as wide as the next.
struct Scale {
    /// Powers of two at the ends.
    least: f64,
    greatest: f64,
}

impl Scale {
    fn of(rows: &[Row]) -> Scale {
        let (mut least, mut greatest) = (-1.0_f64, 2.0_f64);
        for row in rows {
            let ratio = row.ratio();
            least = least.min(ratio.least.log2().floor());
            greatest = greatest.max(ratio.greatest.log2().ceil());
        }
        Scale {
            // One bad round must not press all others together.
            least: least.max(-3.0),
            greatest: greatest.min(5.0),
        }
    }

    fn x(&self, ratio: f64) -> f64 {
        let share = (ratio.log2() - self.least) / (self.greatest - self.least);
        LEFT + share.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + use<> {
        (self.least as i32..=self.greatest as i32).map(|power| 2_f64.powi(power))
    }
}
