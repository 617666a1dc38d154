//! For people or for programs.

use std::io::{self, Write};

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::exit::Code;
use crate::failure::Failure;
use crate::plain::{plain, plain_json};

/// The form in which a command answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// The options that choose it.
#[derive(Args, Clone, Copy, Debug)]
pub struct OutputArgs {
    /// Form of the answer
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Text)]
    pub output: Format,

    /// Short for --output json
    #[arg(long, conflicts_with = "output")]
    pub json: bool,
}

impl OutputArgs {
    /// Whether a program reads the answer.
    pub fn is_json(self) -> bool {
        self.json || self.output == Format::Json
    }

    /// Prints `value` as JSON, or `text` of it.
    pub fn print<T: Serialize>(self, value: &T, text: impl Fn(&T) -> String) -> Result<(), Failure> {
        let mut answer = self.render(value, text)?;
        if !answer.is_empty() && !answer.ends_with('\n') {
            answer.push('\n');
        }
        print(answer.as_bytes())
    }

    /// `value` as JSON, or `text` of it.
    pub fn render<T: Serialize>(self, value: &T, text: impl Fn(&T) -> String) -> Result<String, Failure> {
        if self.is_json() { to_json(value) } else { Ok(plain(&text(value)).into_owned()) }
    }
}

fn to_json<T: Serialize>(value: &T) -> Result<String, Failure> {
    let json = serde_json::to_string_pretty(value);
    let json = json.map_err(|error| Failure::from_error(Code::Internal, &error))?;
    Ok(plain_json(&json).into_owned())
}

/// A table for people.
pub fn table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let titles = titles.iter().map(|title| (*title).to_owned()).collect();
    let rows: Vec<&Vec<String>> = std::iter::once(&titles).chain(rows).collect();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..titles.len()).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &&Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}  "));
        cells.collect::<String>().trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// Writes to standard output. A reader that has seen enough (`ospite man | head`) is no failure.
pub fn print(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Code::Internal, format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["web".to_owned(), "running".into()], vec!["ä".into(), String::new()]];
        assert_eq!(table(&["NAME", "STATE"], &rows), "NAME  STATE\nweb   running\nä\n");
    }
}
