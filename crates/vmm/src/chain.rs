//! Errors for people.

use std::error::Error;

/// An error and its causes in one line. A cause that its effect has quoted already is not repeated:
/// not every library keeps the two apart.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |&error| error.source()) {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    one_line(&text)
}

/// Libraries put line breaks into their messages, and people into their files' names.
fn one_line(text: &str) -> String {
    text.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        source: Option<Box<Link>>,
    }

    #[test]
    fn the_whole_chain_is_one_line_without_repetition() {
        let cause = Link { text: "no such\n  file", source: None };
        let middle = Link { text: "disk a.img: no such\n  file", source: Some(Box::new(cause)) };
        let error = Link { text: "cannot build the machine", source: Some(Box::new(middle)) };
        assert_eq!(chain(&error), "cannot build the machine: disk a.img: no such; file");
    }
}
