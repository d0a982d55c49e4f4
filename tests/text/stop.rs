//! Stop strings against a plain search.

use lowbit::text::StopStrings;
use proptest::prelude::*;

fn stops(strings: &[&str], include: bool) -> StopStrings {
    StopStrings::new(&strings.iter().map(|s| s.to_string()).collect::<Vec<_>>(), include).unwrap()
}

/// Text up to the stop string that ends first, of those the longest; whether there is one.
fn plain(text: &str, strings: &[String], include: bool) -> (String, bool) {
    for end in 0..=text.len() {
        let head = &text.as_bytes()[..end];
        if let Some(stop) = strings.iter().filter(|s| head.ends_with(s.as_bytes())).max_by_key(|s| s.len()) {
            return (text[..if include { end } else { end - stop.len() }].to_string(), true);
        }
    }
    (text.to_string(), false)
}

#[test]
fn holds_back_only_what_may_be_a_stop_string() {
    let mut s = stops(&["</end>", "STOP"], false);
    assert_eq!(s.push("Hello <"), "Hello ");
    assert_eq!(s.push("b> <"), "<b> ");
    assert_eq!(s.push("/en"), "");
    assert_eq!(s.push("d> more"), "");
    assert!(s.found());
    assert_eq!(s.push("more"), "");
    assert_eq!(s.finish(), "");

    let mut s = stops(&["STOP"], true);
    assert_eq!(s.push("aST") + &s.push("OPb"), "aSTOP");
    let mut s = stops(&["STOP"], false);
    assert_eq!(s.push("aST"), "a");
    assert_eq!(s.finish(), "ST");
    assert!(!s.found());
    let mut s = stops(&[], false);
    assert_eq!(s.push("all"), "all");
}

#[test]
fn refuses_absurd_stop_strings() {
    assert!(StopStrings::new(&[String::new()], false).is_err());
    assert!(StopStrings::new(&["x".repeat(1025)], false).is_err());
    assert!(StopStrings::new(&vec!["x".to_string(); 65], false).is_err());
    assert!(StopStrings::new(&vec!["x".repeat(1024); 64], false).is_ok());
}

proptest! {
    #[test]
    fn the_same_wherever_chunks_end(
        chunks in prop::collection::vec("[abé]{0,4}", 0..12),
        strings in prop::collection::vec("[abé]{1,5}", 0..4),
        include: bool,
    ) {
        let text = chunks.concat();
        let mut stop = StopStrings::new(&strings, include).unwrap();
        let mut got: String = chunks.iter().map(|chunk| stop.push(chunk)).collect();
        let found = stop.found();
        got += &stop.finish();
        prop_assert_eq!((got, found), plain(&text, &strings, include));
    }
}
