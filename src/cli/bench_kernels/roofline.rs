//! Roofline plots (Williams, Waterman, Patterson 2009): operations a second over operations per byte, under what memory
//! and tensor cores allow.

use std::ops::Range;

use plotters::backend::SVGBackend;
use plotters::chart::{ChartBuilder, LabelAreaPosition};
use plotters::coord::combinators::IntoLogRange;
use plotters::drawing::IntoDrawingArea;
use plotters::element::{Circle, PathElement, Text};
use plotters::series::LineSeries;
use plotters::style::text_anchor::{HPos, VPos};
use plotters::style::{Color, HSLColor, RGBAColor, RGBColor, TextStyle, WHITE};

use crate::error::{Error, Result};

use super::super::plot::{Canvas, DOT, GRID, LETTER, Labels, QUIET, TEXT, anchored, distance, plain, reason, style};
use super::Op;
use super::report::{Measurement, Report, Unit};

/// Pixels of the picture, and of the plot in it; the legend is at the right.
const SIZE: (u32, u32) = (1080, 680);
const LEFT: i32 = 80;
const RIGHT: i32 = 850;
const TOP: i32 = 76;
const BOTTOM: i32 = 614;

/// Told apart also by those who see few colours (Okabe and Ito 2008), and on white.
const COLORS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 90, 60),
    RGBColor(0, 0, 0),
];
/// One measurement in the plot.
#[derive(Debug, Clone, Copy)]
struct Point {
    /// Which shape it is of.
    family: usize,
    m: usize,
    /// Operations a byte.
    intensity: f64,
    /// 10^12 operations a second.
    tera: f64,
    /// The same of cuBLASLt's product of the same type.
    peer: Option<f64>,
}

/// The plot of `op`; `None` where the report has nothing of it that multiplies and can be drawn.
///
/// # Errors
/// `Text`, should the picture not be drawn.
pub(super) fn svg(report: &Report, op: Op) -> Result<Option<String>> {
    let found: Vec<&Measurement> =
        report.measurements.iter().filter(|found| found.op == op && found.operations > 0).collect();
    let Some(unit) = found.first().and_then(|found| found.unit) else { return Ok(None) };
    let (families, points) = points(&found, unit);
    let roof = Roof {
        copy: report.ceilings.copy.per_s / 1e12,
        tensor: report.ceilings.tensor(unit).map(|ceiling| ceiling.per_s / 1e12).filter(|&tera| is_drawable(tera)),
        unit,
    };
    if points.is_empty() || !is_drawable(roof.copy) {
        return Ok(None);
    }
    let mut picture = String::new();
    let root = SVGBackend::with_string(&mut picture, SIZE).into_drawing_area();
    draw(&root, report, op, &roof, &families, &points)
        .and_then(|()| root.present().map_err(|e| e.to_string()))
        .map_err(|reason| Error::Text { what: format!("roofline of {}", op.name()), reason })?;
    drop(root);
    Ok(Some(picture))
}

/// The two ceilings: 10^12 bytes and 10^12 operations a second.
#[derive(Debug, Clone, Copy)]
struct Roof {
    copy: f64,
    tensor: Option<f64>,
    unit: Unit,
}

/// False of what no measurement gives, which axes of sane length cannot show.
fn is_drawable(x: f64) -> bool {
    (1e-9..1e9).contains(&x)
}

fn draw(
    root: &Canvas<'_>,
    report: &Report,
    op: Op,
    roof: &Roof,
    families: &[&str],
    points: &[Point],
) -> Result<(), String> {
    let &Roof { copy, tensor, unit } = roof;
    let (x, y) = ranges(points, copy, tensor);
    root.fill(&WHITE).map_err(reason)?;
    let (width, height) = (SIZE.0 as i32, SIZE.1 as i32);
    let mut chart = ChartBuilder::on(root)
        .margin_top(TOP)
        .margin_right(width - RIGHT)
        .set_label_area_size(LabelAreaPosition::Left, LEFT)
        .set_label_area_size(LabelAreaPosition::Bottom, height - BOTTOM)
        .build_cartesian_2d(x.clone().log_scale(), y.clone().log_scale())
        .map_err(reason)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(QUIET)
        .label_style(style(13, &TEXT))
        .x_label_formatter(&|x| plain(*x))
        .y_label_formatter(&|y| plain(*y))
        .draw()
        .map_err(reason)?;

    let ridge = tensor.map_or(x.end, |tensor| (tensor / copy).clamp(x.start, x.end));
    let roof = [(x.start, copy * x.start), (ridge, copy * ridge), (x.end, tensor.unwrap_or(copy * x.end))];
    chart.draw_series(LineSeries::new(roof, TEXT.stroke_width(2))).map_err(reason)?;
    for (family, _) in families.iter().enumerate() {
        let line = points.iter().filter(|p| p.family == family).map(|p| (p.intensity, p.tera));
        chart
            .draw_series(LineSeries::new(line, color(family, families.len()).mix(0.35).stroke_width(1)))
            .map_err(reason)?;
    }
    for p in points {
        if let Some(peer) = p.peer {
            chart
                .draw_series([Circle::new((p.intensity, peer), DOT - 1, color(p.family, families.len()))])
                .map_err(reason)?;
        }
    }
    for p in points {
        chart
            .draw_series([Circle::new((p.intensity, p.tera), DOT, color(p.family, families.len()).filled())])
            .map_err(reason)?;
    }

    let at = |x: f64, y: f64| chart.backend_coord(&(x, y));
    let slope_at = (x.start * ridge).sqrt().max(x.start * 1.5);
    let (slope_x, slope_y) = at(slope_at, copy * slope_at);
    let words = format!("copy {copy:.2} TB/s");
    text(root, (slope_x - 10, slope_y - 8), words, anchored(14, &TEXT, HPos::Right, VPos::Bottom))?;
    if let Some(tensor) = tensor {
        let words = format!("{} {tensor:.0} {}", unit_label(unit), unit_name(unit));
        text(root, (RIGHT - 6, at(x.end, tensor).1 - 5), words, anchored(14, &TEXT, HPos::Right, VPos::Bottom))?;
    }
    text(root, (LEFT + 8, TOP + 8), unit_name(unit).into(), anchored(13, &QUIET, HPos::Left, VPos::Center))?;
    let words = "operations per byte of device memory".into();
    text(root, ((LEFT + RIGHT) / 2, BOTTOM + 38), words, anchored(13, &QUIET, HPos::Center, VPos::Center))?;
    // Where each shape has but one number of rows, its name says it.
    if points.len() != families.len() {
        label_rows(root, points, at)?;
    }
    title(root, report, op)?;
    legend(root, families, points.iter().any(|p| p.peer.is_some()), unit)
}

fn text(root: &Canvas<'_>, at: (i32, i32), words: String, style: TextStyle<'_>) -> Result<(), String> {
    root.draw(&Text::new(words, at, style)).map_err(reason)
}

/// Each number of rows once, under its lowest point; `at` is where a point is in the picture.
fn label_rows(root: &Canvas<'_>, points: &[Point], at: impl Fn(f64, f64) -> (i32, i32)) -> Result<(), String> {
    let teras = |p: &Point| [Some(p.tera), p.peer].into_iter().flatten();
    let dots = points.iter().flat_map(|p| teras(p).map(|tera| at(p.intensity, tera)));
    let mut labels = Labels::new([LEFT, TOP, RIGHT, BOTTOM], dots);
    let mut rows: Vec<usize> = points.iter().map(|p| p.m).collect();
    rows.sort_unstable();
    rows.dedup();
    for m in rows {
        let own = points.iter().filter(|p| p.m == m);
        let Some(lowest) = own.min_by(|a, b| a.tera.total_cmp(&b.tera)) else { continue };
        let words = format!("m={m}");
        let from = at(lowest.intensity, lowest.tera);
        if let Some(to) = labels.place_below(from, words.len() as i32) {
            if distance(from, to) > 2 * LETTER.1 {
                root.draw(&PathElement::new([(from.0, from.1 + DOT), (to.0, to.1)], QUIET.mix(0.5))).map_err(reason)?;
            }
            text(root, to, words, anchored(12, &QUIET, HPos::Center, VPos::Top))?;
        }
    }
    Ok(())
}

/// What was measured under which conditions, above the plot.
fn title(root: &Canvas<'_>, report: &Report, op: Op) -> Result<(), String> {
    let conditions = &report.conditions;
    text(root, (LEFT, 14), format!("{} on {}", op.name(), conditions.gpu), style(20, &TEXT))?;
    let date = conditions.date.split('T').next().unwrap_or_default();
    let clock = conditions.sm_mhz.map(|clock| format!(", SM at {:.0} MHz", clock.median)).unwrap_or_default();
    let words = format!(
        "{}, kernels for sm_{}{clock}, {date}; ceilings measured in the same run",
        conditions.dtype, conditions.sm
    );
    text(root, (LEFT, 42), words, style(13, &QUIET))
}

/// Shapes, and peers, at the right of the plot.
fn legend(root: &Canvas<'_>, families: &[&str], has_peers: bool, unit: Unit) -> Result<(), String> {
    let (x, mut y) = (RIGHT + 24, TOP + 10);
    let label = |y, words: String| text(root, (x + 14, y), words, anchored(14, &TEXT, HPos::Left, VPos::Center));
    let line = ((BOTTOM - TOP - 60) / families.len().max(1) as i32).min(22);
    for (family, name) in families.iter().enumerate() {
        root.draw(&Circle::new((x, y), DOT, color(family, families.len()).filled())).map_err(reason)?;
        label(y, (*name).to_owned())?;
        y += line;
    }
    if has_peers {
        y += 12;
        root.draw(&Circle::new((x, y), DOT - 1, QUIET)).map_err(reason)?;
        label(y, format!("cuBLASLt {}, same product", unit_label(unit)))?;
    }
    Ok(())
}

/// Names of the shapes in order, and the points.
fn points<'a>(found: &[&'a Measurement], unit: Unit) -> (Vec<&'a str>, Vec<Point>) {
    let mut families: Vec<&str> = Vec::new();
    let mut points = Vec::new();
    for found in found {
        let family = families.iter().position(|name| *name == found.shape).unwrap_or_else(|| {
            families.push(&found.shape);
            families.len() - 1
        });
        let peer = found.peers.iter().find(|peer| peer.unit == unit);
        let tera = |per_s: f64| Some(per_s / 1e12).filter(|&tera| is_drawable(tera));
        let Some(ours) = tera(found.rates.operations_per_s) else { continue };
        points.push(Point {
            family,
            m: found.m,
            intensity: found.operations as f64 / found.bytes.max(1) as f64,
            tera: ours,
            peer: peer.and_then(|peer| tera(peer.time.per_s(found.operations))),
        });
    }
    (families, points)
}

/// What the axes span: all points with room around them, and the ridge where the two ceilings meet.
fn ranges(points: &[Point], copy: f64, tensor: Option<f64>) -> (Range<f64>, Range<f64>) {
    let span = |values: &mut dyn Iterator<Item = f64>| {
        values
            .filter(|v| v.is_finite() && *v > 0.0)
            .fold((f64::MAX, f64::MIN_POSITIVE), |(low, high), v| (low.min(v), high.max(v)))
    };
    let ridge = tensor.map(|tensor| tensor / copy);
    let (left, right) = span(&mut points.iter().map(|p| p.intensity).chain(ridge));
    let both = points.iter().flat_map(|p| [Some(p.tera), p.peer]).chain([tensor]);
    let (bottom, top) = span(&mut both.flatten());
    (left / 2.0..right * 3.0, bottom / 3.0..top * 2.0)
}

/// Colour of one of `count` families: no two share one.
fn color(family: usize, count: usize) -> RGBAColor {
    if count <= COLORS.len() {
        return COLORS[family].to_rgba();
    }
    HSLColor(family as f64 / count as f64, 0.75, 0.4).to_rgba()
}

fn unit_name(unit: Unit) -> &'static str {
    match unit {
        Unit::Int8 => "TOPS",
        Unit::Float16 => "TFLOP/s",
    }
}

fn unit_label(unit: Unit) -> &'static str {
    match unit {
        Unit::Int8 => "int8",
        Unit::Float16 => "16-bit",
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::synthetic;
    use super::*;

    /// An element: its name, its attributes, the text after its start.
    struct Element<'a> {
        name: &'a str,
        attributes: Vec<(&'a str, &'a str)>,
        text: &'a str,
    }

    impl Element<'_> {
        fn number(&self, attribute: &str) -> f64 {
            let value = self.attributes.iter().find(|(name, _)| *name == attribute).expect("the attribute is there").1;
            value.parse().expect("a number")
        }
    }

    /// All elements of a document, whose tags must pair up and whose attributes must be quoted.
    fn parse(svg: &str) -> Vec<Element<'_>> {
        let (mut open, mut elements) = (Vec::new(), Vec::new());
        for part in svg.split('<').skip(1) {
            let (tag, text) = part.split_once('>').expect("a tag ends");
            assert!(!text.contains('>'), "a bare > in {text}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name));
                continue;
            }
            if tag.starts_with('?') {
                continue;
            }
            let body = tag.trim_end_matches('/');
            let (name, mut rest) = body.split_once(' ').unwrap_or((body, ""));
            let mut attributes = Vec::new();
            while let Some((key, after)) = rest.trim_start().split_once("=\"") {
                let (value, after) = after.split_once('"').expect("a value is quoted");
                attributes.push((key, value));
                rest = after;
            }
            assert!(rest.trim().is_empty(), "{tag}");
            if !tag.ends_with('/') {
                open.push(name);
            }
            elements.push(Element { name, attributes, text: text.trim() });
        }
        assert!(open.is_empty(), "{open:?} never end");
        elements
    }

    fn picture() -> String {
        svg(&synthetic(), Op::W8a8).expect("draws").expect("multiplies")
    }

    #[test]
    fn every_label_is_there_once() {
        let picture = picture();
        let texts: Vec<&str> = parse(&picture).iter().filter(|e| e.name == "text").map(|e| e.text).collect();
        for label in [
            "w8a8 on NVIDIA H200",
            "bf16, kernels for sm_90, SM at 1980 MHz, 2026-11-22; ceilings measured in the same run",
            "copy 4.00 TB/s",
            "int8 1100 TOPS",
            "operations per byte of device memory",
            "8192x8192",
            "4096x4096",
            "cuBLASLt int8, same product",
            "m=1",
            "m=64",
            "m=4096",
        ] {
            assert_eq!(texts.iter().filter(|text| **text == label).count(), 1, "{label} in {texts:?}");
        }
        assert!(!texts.contains(&"4096 to i8"), "an op of another plot");
    }

    #[test]
    fn points_are_where_the_axes_say() {
        let picture = picture();
        let elements = parse(&picture);
        // Position of the ticks 10 and 100 of an axis, whose labels lie beyond its edge.
        let axis = |position: &str, beyond: &dyn Fn(&Element<'_>) -> bool| {
            let tick = |label: &str| {
                let found = elements.iter().find(|e| e.name == "text" && e.text == label && beyond(e));
                found.unwrap_or_else(|| panic!("no tick {label}")).number(position)
            };
            let (ten, hundred) = (tick("10"), tick("100"));
            move |value: f64| ten + (value / 10.0).log10() * (hundred - ten)
        };
        let x = axis("x", &|e| e.number("y") > f64::from(BOTTOM));
        let y = axis("y", &|e| e.number("x") < f64::from(LEFT));
        let dots: Vec<(f64, f64)> =
            elements.iter().filter(|e| e.name == "circle").map(|e| (e.number("cx"), e.number("cy"))).collect();
        // m, n, k, microseconds of the synthetic measurements.
        for [m, n, us] in [
            [1.0, 8192.0, 20.0],
            [64.0, 8192.0, 22.0],
            [4096.0, 8192.0, 500.0],
            [1.0, 4096.0, 8.0],
            [64.0, 4096.0, 9.0],
        ] {
            let intensity = 2.0 * m * n * n / (n * n + 3.0 * m * n);
            let tera = 2.0 * m * n * n / us / 1e6;
            for tera in [tera, tera / 4.0] {
                let (x, y) = (x(intensity), y(tera));
                let near = dots.iter().any(|dot| (dot.0 - x).abs() < 2.0 && (dot.1 - y).abs() < 2.0);
                assert!(near, "m={m} n={n}: no dot at {x:.0}, {y:.0} in {dots:?}");
            }
        }
        // Five of ours, five of cuBLASLt's; in the legend two shapes and one for cuBLASLt.
        assert_eq!(dots.len(), 13);
    }

    #[test]
    fn nothing_to_draw_is_no_picture() {
        let mut report = synthetic();
        assert_eq!(svg(&report, Op::RmsNorm).expect("no error"), None);
        assert_eq!(svg(&report, Op::Dense).expect("no error"), None);
        report.measurements.truncate(2);
        report.ceilings.int8 = None;
        parse(&svg(&report, Op::W8a8).expect("draws").expect("one point"));
        for hostile in [f64::NAN, f64::INFINITY, 0.0, -1.0, 1e300, 1e-300] {
            let mut report = report.clone();
            report.measurements.iter_mut().for_each(|found| found.rates.operations_per_s = hostile);
            assert_eq!(svg(&report, Op::W8a8).expect("no error"), None, "{hostile}");
            let mut report = synthetic();
            report.ceilings.copy.per_s = hostile;
            assert_eq!(svg(&report, Op::W8a8).expect("no error"), None, "{hostile}");
            let mut report = synthetic();
            report.ceilings.int8.as_mut().expect("given").per_s = hostile;
            parse(&svg(&report, Op::W8a8).expect("draws").expect("without a ceiling"));
        }
    }
}
