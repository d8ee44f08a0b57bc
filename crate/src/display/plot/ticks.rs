//! Where an axis has its ticks, and what stands at them.

/// Ticks at round numbers in `low..=high`: multiples of 1, 2 or 5 times a power of ten.
pub(super) fn linear(low: f64, high: f64) -> Vec<f64> {
    let width = high - low;
    if !(width.is_finite() && width > 0.0) {
        return vec![low];
    }
    let rough = width / 7.0;
    let decade = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * decade).into_iter().find(|s| *s >= rough * 0.999).unwrap_or(rough);
    let first = (low / step).ceil();
    // A multiple of the step each, so that errors do not add up.
    (0..12).map(|i| (first + f64::from(i)) * step).take_while(|t| *t <= high + step * 1e-9).collect()
}

/// Ticks of a logarithmic axis from `low` to `high`, both positive: `values` themselves where
/// there are ten of them at most, otherwise powers of ten, with 2 and 5 times them where there is room.
pub(super) fn logarithmic(low: f64, high: f64, values: &mut Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values.dedup();
    if values.len() <= 10 && values.windows(2).all(|w| w[1] / w[0] > 1.15) {
        return values.clone();
    }
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let every = ((last - first) / 10).max(1) as usize;
    let multiples: &[f64] = if last - first <= 3 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let decades = (first..=last).step_by(every);
    let all = decades.flat_map(|d| multiples.iter().map(move |m| m * 10f64.powi(d)));
    all.filter(|t| (low..=high).contains(t)).collect()
}

/// A tick's number with the decimals that an axis of this width needs.
pub(super) fn label(value: f64, width: f64) -> String {
    if value != 0.0 && (value.abs() >= 1e6 || width < 1e-5) {
        return short(value);
    }
    let decimals = (2.0 - width.log10()).ceil().clamp(0.0, 9.0) as usize;
    // No "-0".
    let text = format!("{:.*}", if width >= 20.0 { 0 } else { decimals.min(6) }, value + 0.0);
    without_zeros(&text)
}

/// A number with three significant digits: `128`, `0.0727`, `5e-5`.
pub(super) fn short(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-3..1e6).contains(&magnitude) {
        let text = format!("{value:.2e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{exponent}", without_zeros(mantissa));
    }
    let decimals = (2.0 - magnitude.max(1e-3).log10().floor()).clamp(0.0, 5.0) as usize;
    without_zeros(&format!("{:.decimals$}", value + 0.0))
}

fn without_zeros(text: &str) -> String {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(linear(0.0, 200.0), [0.0, 50.0, 100.0, 150.0, 200.0]);
        assert_eq!(linear(1.9, 4.2), [2.0, 2.5, 3.0, 3.5, 4.0]);
        assert_eq!(linear(3.0, 3.0), [3.0]);
        for (low, high) in [(-1e300, 1e300), (1e-300, 2e-300), (1e15, 1e15 + 1.0), (f64::MIN, f64::MAX)] {
            let ticks = linear(low, high);
            assert!(!ticks.is_empty() && ticks.len() <= 12, "{ticks:?}");
        }
    }

    #[test]
    fn logarithmic_ticks_are_the_values_or_powers_of_ten() {
        assert_eq!(logarithmic(1.0, 8.0, &mut vec![8.0, 1.0, 2.0, 4.0, 4.0]), [1.0, 2.0, 4.0, 8.0]);
        let many = &mut (1..100).map(f64::from).collect();
        assert_eq!(logarithmic(1.0, 99.0, many), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        let wide = &mut (1..100).map(|i| 1.3f64.powi(i)).collect();
        assert_eq!(logarithmic(1.3, 1e11, wide).len(), 11);
    }

    #[test]
    fn ticks_have_as_many_decimals_as_they_need() {
        assert_eq!(label(50.0, 150.0), "50");
        assert_eq!(label(2.5, 4.0), "2.5");
        assert_eq!(label(2.0, 4.0), "2");
        assert_eq!(label(-0.0, 4.0), "0");
        assert_eq!(label(0.0125, 0.04), "0.0125");
        assert_eq!(label(2e9, 6e9), "2e9");
    }

    #[test]
    fn short_numbers_have_three_digits() {
        let all = [128.0, 29.7164, 4.127, 0.072798, 0.0005, 1e-5, 6.5e9, 0.0, 99.99].map(short);
        assert_eq!(all, ["128", "29.7", "4.13", "0.0728", "5e-4", "1e-5", "6.5e9", "0", "100"]);
    }
}
