//! Words that may be a guest's or a stranger's, such as names of files in an archive, on their way to a terminal:
//! they must not drive it.

use std::borrow::Cow;

/// Whether a terminal does something else with it than to show it. Marks that turn the order of writing around
/// show one thing and mean another.
fn drives(c: char) -> bool {
    let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    turns || c.is_control() && !matches!(c, '\n' | '\t')
}

/// `text` with what drives a terminal escaped.
pub fn plain(text: &str) -> Cow<'_, str> {
    if !text.contains(drives) {
        return text.into();
    }
    let escape = |c: char| if drives(c) { c.escape_default().collect() } else { c.to_string() };
    text.chars().map(escape).collect::<String>().into()
}

/// The same of JSON, where such characters are in strings only.
pub fn plain_json(text: &str) -> Cow<'_, str> {
    if !text.contains(drives) {
        return text.into();
    }
    let escape = |c: char| if drives(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    text.chars().map(escape).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drives_a_terminal_is_shown_and_the_rest_is_as_it_was() {
        assert_eq!(plain("VM ä\n\tone"), "VM ä\n\tone");
        assert_eq!(
            plain("a\x1b]0;title\x07b\r\u{9b}2J\u{202e}c"),
            r"a\u{1b}]0;title\u{7}b\r\u{9b}2J\u{202e}c"
        );
    }

    #[test]
    fn json_stays_what_it_was_to_a_program() {
        let words = "a\u{9b}2J\u{7f}\u{202e}\x1b\n\"b\"";
        let json = serde_json::to_string_pretty(&[words]).unwrap();
        let safe = plain_json(&json);
        assert!(!safe.contains(drives));
        assert_eq!(serde_json::from_str::<[String; 1]>(&safe).unwrap(), [words]);
    }
}
