//! Exit codes. Ours are even, so that none can be mistaken for a debug-exit value, which is odd.

use std::fmt::Write;

/// How ospite ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The guest powered itself off, or the command did what it was asked.
    Success,
    /// The guest wrote this to the debug-exit port.
    DebugExit(u32),
    /// The command line is wrong.
    Usage,
    /// The machine cannot be built as asked.
    Build,
    /// No engine that was asked for works here.
    Engine,
    /// ospite or the host failed while the guest ran.
    Internal,
    /// The guest triple-faulted with `--no-reboot`.
    TripleFault,
    /// The guest reset itself with `--no-reboot`.
    Reset,
    /// The user cut the power.
    Killed,
    /// There is no such VM, or it is not in a state for what was asked.
    WrongState,
    /// A command in the guest ended like this; 255 if we failed to run it.
    Guest(u8),
}

impl Code {
    const OURS: [Code; 9] = {
        use Code::*;
        [Success, Usage, Build, Engine, Internal, TripleFault, Reset, Killed, WrongState]
    };

    /// The number that the shell sees.
    pub fn number(self) -> i32 {
        match self {
            Code::Success => 0,
            // As the kernel test suites that use port 0xf4 expect it; the system keeps eight bits.
            Code::DebugExit(value) => ((value << 1 | 1) & 0xff) as i32,
            Code::Usage => 2,
            Code::Build => 4,
            Code::Engine => 6,
            Code::Internal => 8,
            Code::TripleFault => 10,
            Code::Reset => 12,
            Code::Killed => 14,
            Code::WrongState => 16,
            Code::Guest(code) => code.into(),
        }
    }

    /// The code that a VM's process ended with, or what it comes nearest to.
    pub fn of_process(number: i32) -> Code {
        let debug_exit = (number & 1 == 1).then_some(Code::DebugExit(number as u32 >> 1));
        Code::from_number(number).or(debug_exit).unwrap_or(Code::Internal)
    }

    /// The code with that number; debug-exit values have none of their own.
    pub fn from_number(number: i32) -> Option<Code> {
        Code::OURS.into_iter().find(|code| code.number() == number)
    }
}

/// The table that `--help`, the man page and the README show.
const TABLE: &[(&str, &str)] = &[
    ("0", "the guest powered itself off; other commands: done"),
    ("odd", "the guest wrote V to the debug-exit port 0xf4: V << 1 | 1, low 8 bits"),
    ("2", "the command line is wrong"),
    ("4", "a file is missing or broken, or memory is short: nothing was started"),
    ("6", "the engine that was asked for does not work on this host"),
    ("8", "ospite or the host failed while the guest ran"),
    ("10", "the guest triple-faulted, and --no-reboot was given"),
    ("12", "the guest reset itself, and --no-reboot was given"),
    ("14", "the power was cut from the console's menu"),
    ("16", "there is no such VM, or it is not in a state for what was asked"),
    ("signal", "the power was cut by a signal: ospite dies of that signal"),
];

/// The table for `--help`.
pub fn help() -> String {
    TABLE.iter().fold("Exit codes:\n".into(), |mut text, (code, meaning)| {
        let _ = writeln!(text, "  {code:<7} {meaning}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_exit_values_become_odd_codes_and_ours_are_even() {
        assert_eq!(Code::DebugExit(0).number(), 1);
        assert_eq!(Code::DebugExit(0x10).number(), 33);
        assert_eq!(Code::DebugExit(u32::MAX).number(), 255);
        for ours in Code::OURS {
            assert_eq!(ours.number() % 2, 0, "{ours:?}");
        }
    }

    #[test]
    fn what_a_process_ended_with_is_what_it_returned() {
        for code in Code::OURS.into_iter().chain([0, 1, 127].map(Code::DebugExit)) {
            assert_eq!(Code::of_process(code.number()), code);
        }
        assert_eq!(Code::of_process(254), Code::Internal, "nobody's");
    }

    #[test]
    fn every_code_of_ours_is_in_the_table() {
        for ours in Code::OURS {
            assert!(TABLE.iter().any(|(code, _)| *code == ours.number().to_string()), "{ours:?}");
        }
    }

    #[test]
    fn the_readme_has_the_same_table() {
        let readme = include_str!("../../../README.md");
        for (code, meaning) in TABLE {
            let row = format!("| {code} | {} |", meaning.replace('|', "\\|"));
            assert!(readme.contains(&row), "README.md lacks: {row}");
        }
    }
}
