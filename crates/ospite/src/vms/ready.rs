//! How `start` learns whether the VM runs: the VM's process says so on the pipe that is its standard
//! output, in one line of JSON.

use std::io::{self, BufRead, BufReader, Read, Write};

use serde::{Deserialize, Serialize};

use crate::exit::Code;
use crate::failure::Failure;

/// What the VM's process says once.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Started,
    Failed { code: i32, message: String, hint: Option<String> },
}

/// Says how the start went. Whoever started it may have gone.
pub fn tell(to: &mut impl Write, outcome: Result<(), &Failure>) {
    let word = match outcome {
        Ok(()) => Word::Started,
        Err(failure) => Word::Failed {
            code: failure.code().number(),
            message: failure.message().into(),
            hint: failure.hint_text().map(Into::into),
        },
    };
    if let Ok(mut line) = serde_json::to_vec(&word) {
        line.push(b'\n');
        let _ = to.write_all(&line).and_then(|()| to.flush());
    }
}

/// Waits for the word.
///
/// # Errors
/// The failure that the VM's process met; `None` where it has died without a word.
pub fn hear(from: impl Read) -> Result<(), Option<Failure>> {
    match read(from) {
        Ok(Word::Started) => Ok(()),
        Ok(Word::Failed { code, message, hint }) => {
            let failure = Failure::new(Code::from_number(code).unwrap_or(Code::Internal), message);
            Err(Some(match hint {
                Some(hint) => failure.hint(hint),
                None => failure,
            }))
        }
        Err(_) => Err(None),
    }
}

fn read(from: impl Read) -> io::Result<Word> {
    let mut line = Vec::new();
    BufReader::new(from).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_heard_as_it_was_told() {
        let mut pipe = Vec::new();
        tell(&mut pipe, Err(&Failure::new(Code::Engine, "no engine").hint("ospite doctor")));
        let heard = hear(&pipe[..]).unwrap_err().unwrap();
        assert_eq!((heard.code(), heard.message()), (Code::Engine, "no engine"));
        assert_eq!(heard.hint_text(), Some("ospite doctor"));
        pipe.clear();
        tell(&mut pipe, Ok(()));
        hear(&pipe[..]).unwrap();
        assert!(hear(&b""[..]).unwrap_err().is_none(), "it has died");
    }
}
