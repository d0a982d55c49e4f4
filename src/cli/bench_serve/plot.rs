//! A run as a picture: how TTFT and ITL are distributed, and tokens a second over time.

use plotters::backend::SVGBackend;
use plotters::chart::{ChartBuilder, LabelAreaPosition};
use plotters::drawing::IntoDrawingArea;
use plotters::element::{PathElement, Rectangle, Text};
use plotters::style::text_anchor::{HPos, VPos};
use plotters::style::{Color, RGBColor, WHITE};

use super::super::plot::{Canvas, GRID, QUIET, TEXT, anchored, reason, style};
use super::metrics::{Metric, percentile, tokens_by_second};
use super::report::Report;
use crate::error::{Error, Result};

/// Pixels of the picture, of which each panel takes a third.
const SIZE: (u32, u32) = (1080, 900);
const TITLE: u32 = 60;
const BARS: usize = 60;
const BAR: RGBColor = RGBColor(0, 114, 178);
const MARK: RGBColor = RGBColor(213, 94, 0);

/// Bars side by side, from 0 on, and values to mark.
struct Panel {
    title: String,
    x_label: &'static str,
    y_label: &'static str,
    /// Width of a bar.
    width: f64,
    bars: Vec<f64>,
    marks: Vec<(String, f64)>,
}

/// # Errors
/// [`Error::Text`], should the picture not be drawn.
pub(super) fn svg(report: &Report<'_>) -> Result<String> {
    let mut picture = String::new();
    let root = SVGBackend::with_string(&mut picture, SIZE).into_drawing_area();
    draw(&root, report)
        .and_then(|()| root.present().map_err(|e| e.to_string()))
        .map_err(|reason| Error::Text { what: "plot of the run".to_string(), reason })?;
    drop(root);
    Ok(picture)
}

fn draw(root: &Canvas<'_>, report: &Report<'_>) -> Result<(), String> {
    root.fill(&WHITE).map_err(reason)?;
    let conditions = report.conditions;
    let words = format!("{} at {}", conditions.model, conditions.url);
    root.draw(&Text::new(words, (24, 14), style(20, &TEXT))).map_err(reason)?;
    let rate = if conditions.request_rate.is_finite() {
        format!("{} requests/s", conditions.request_rate)
    } else {
        "all at once".into()
    };
    let most = conditions.max_concurrency.map_or(String::new(), |most| format!(", at most {most} at a time"));
    let words = format!("{} prompts, {rate}{most}, {}", conditions.num_prompts, conditions.date);
    root.draw(&Text::new(words, (24, 38), style(13, &QUIET))).map_err(reason)?;
    let (_, rest) = root.split_vertically(TITLE);
    let panels = [
        distribution(report, Metric::Ttft, "time to first token (ms)", "requests"),
        distribution(report, Metric::Itl, "inter-token latency (ms)", "tokens"),
        Panel {
            title: "tokens a second".to_string(),
            x_label: "seconds from the first request",
            y_label: "tokens",
            width: 1.0,
            bars: tokens_by_second(&report.run.replies).into_iter().map(|n| n as f64).collect(),
            marks: Vec::new(),
        },
    ];
    rest.split_evenly((3, 1)).iter().zip(panels).try_for_each(|(area, panel)| panel.draw(area))
}

/// How often which value occurs, up to the 99.5th percentile; beyond that a tail would leave no room for the rest.
fn distribution(report: &Report<'_>, metric: Metric, x_label: &'static str, y_label: &'static str) -> Panel {
    let values: Vec<f64> = report.metrics.values(metric).iter().map(|x| x * 1e3).collect();
    let end = percentile(&values, 99.5).max(1e-3);
    let width = end / BARS as f64;
    let mut bars = vec![0.0; BARS];
    for value in values.iter().filter(|value| **value <= end) {
        bars[((value / width) as usize).min(BARS - 1)] += 1.0;
    }
    let marks = [50.0, 99.0].map(|percent| {
        let at = percentile(&values, percent);
        (format!("p{percent} {at:.1}"), at)
    });
    Panel {
        title: metric.name().to_uppercase(),
        x_label,
        y_label,
        width,
        bars,
        marks: if values.is_empty() { Vec::new() } else { marks.to_vec() },
    }
}

impl Panel {
    fn draw(&self, area: &Canvas<'_>) -> Result<(), String> {
        let most = self.bars.iter().copied().fold(0.0, f64::max).max(1.0) * 1.15;
        let end = (self.bars.len().max(1) as f64) * self.width;
        let mut chart = ChartBuilder::on(area)
            .margin(24)
            .set_label_area_size(LabelAreaPosition::Left, 56)
            .set_label_area_size(LabelAreaPosition::Bottom, 40)
            .build_cartesian_2d(0.0..end, 0.0..most)
            .map_err(reason)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .bold_line_style(GRID)
            .light_line_style(WHITE)
            .axis_style(QUIET)
            .label_style(style(12, &TEXT))
            .x_desc(self.x_label)
            .y_desc(self.y_label)
            .draw()
            .map_err(reason)?;
        let bar = |(i, &height): (usize, &f64)| {
            let left = i as f64 * self.width;
            Rectangle::new([(left, 0.0), (left + self.width * 0.92, height)], BAR.mix(0.8).filled())
        };
        chart
            .draw_series(self.bars.iter().enumerate().filter(|(_, height)| **height > 0.0).map(bar))
            .map_err(reason)?;
        for (words, at) in &self.marks {
            let line = PathElement::new([(*at, 0.0), (*at, most)], MARK.stroke_width(1));
            chart.draw_series([line]).map_err(reason)?;
            let (x, y) = chart.backend_coord(&(*at, most));
            let (left, top) = area.get_base_pixel();
            let at = (x - left - 4, y - top + 8);
            area.draw(&Text::new(words.clone(), at, anchored(12, &MARK, HPos::Right, VPos::Center))).map_err(reason)?;
        }
        area.draw(&Text::new(self.title.clone(), (24, 4), style(15, &TEXT))).map_err(reason)
    }
}
