//! Server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>), as servers really send them.

/// Longest event; a token takes some hundred bytes.
const MAX_EVENT: usize = 16 << 20;

/// Finds the data of events in bytes that come in any pieces.
///
/// Lines end with LF, CR or both; a blank after `data:` is left out, several such lines are joined; comments and other fields are
/// passed over.
#[derive(Debug, Default)]
pub(super) struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    after_cr: bool,
}

/// An event is longer than any server of tokens sends.
#[derive(Debug, PartialEq)]
pub(super) struct TooLong;

impl Events {
    /// Takes bytes, and hands the data of each event that is complete to `event`.
    pub(super) fn push(&mut self, bytes: &[u8], mut event: impl FnMut(&[u8])) -> Result<(), TooLong> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|b| matches!(b, b'\n' | b'\r')) {
            let is_second = end == 0 && self.after_cr && rest[0] == b'\n';
            self.after_cr = rest[end] == b'\r';
            if !is_second {
                self.line.extend_from_slice(&rest[..end]);
                self.end_line(&mut event);
            }
            rest = &rest[end + 1..];
        }
        if !rest.is_empty() {
            self.after_cr = false;
            self.line.extend_from_slice(rest);
        }
        if self.line.len() + self.data.len() > MAX_EVENT { Err(TooLong) } else { Ok(()) }
    }

    /// The stream's end: some servers leave out the last blank line.
    pub(super) fn finish(&mut self, mut event: impl FnMut(&[u8])) {
        self.end_line(&mut event);
        self.end_line(&mut event);
    }

    fn end_line(&mut self, event: &mut impl FnMut(&[u8])) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                event(&self.data);
            }
            self.data.clear();
            return;
        }
        let line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&line);
        if let Some(data) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
            self.has_data = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pieces: &[&[u8]]) -> Vec<String> {
        let mut found = Vec::new();
        let mut events = Events::default();
        let mut take = |data: &[u8]| found.push(String::from_utf8(data.to_vec()).expect("UTF-8"));
        pieces.iter().for_each(|piece| events.push(piece, &mut take).expect("short"));
        events.finish(&mut take);
        found
    }

    #[test]
    fn the_same_wherever_bytes_are_cut() {
        let text = "\u{feff}data: {\"a\": \"é\"}\n\n: ping\n\nevent: x\nid: 3\ndata:two\ndata:  lines\n\n\
                    data: with\r\n\r\ndata: and\r\rretry: 1\n\ndata\n\ndata: [DONE]";
        let expected = ["{\"a\": \"é\"}", "two\n lines", "with", "and", "[DONE]"];
        let bytes = text.as_bytes();
        assert_eq!(events(&[bytes]), expected);
        for at in 0..=bytes.len() {
            assert_eq!(events(&[&bytes[..at], &bytes[at..]]), expected, "cut at {at}");
        }
        assert_eq!(events(&bytes.chunks(1).collect::<Vec<_>>()), expected);
    }

    #[test]
    fn nothing_is_no_event() {
        assert_eq!(events(&[]), [] as [&str; 0]);
        assert_eq!(events(&[b"\n\n\r\n: \n\n"]), [] as [&str; 0]);
        assert_eq!(events(&[b"data:\n\n"]), [""]);
    }

    #[test]
    fn events_are_bounded() {
        let mut events = Events::default();
        let piece = vec![b'x'; 1 << 20];
        let pushed = (0..20).map(|_| events.push(&piece, |_| ())).take_while(Result::is_ok).count();
        assert_eq!(pushed, 16);
    }
}
