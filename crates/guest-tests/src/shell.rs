//! A root shell in a Debian guest.

use crate::session::Session;

/// Where a Debian guest has a shell for us. Its prompt is one that no command prints.
pub struct Shell {
    session: Session,
}

/// Printed by the guest's shell; typed in two halves, so that the echo of the typing is not it.
const PROMPT: &str = "ospite-ready>";
/// Kernel messages would get between a command and what it prints.
const SET_PROMPT: &str = "dmesg -n 1; PS1=ospite-'ready>'; stty -echo; bind 'set enable-bracketed-paste off'";

/// Seconds until a login prompt, of which the software engine needs many.
const BOOT: u64 = 600;

impl Shell {
    /// Waits for the login prompt and logs in as root.
    pub fn login(mut session: Session) -> Shell {
        session.wait_for("login: ", BOOT);
        session.type_line("root");
        Shell::at_prompt(session)
    }

    /// Waits for the prompt of a root who is logged in without being asked.
    pub fn at_prompt(mut session: Session) -> Shell {
        session.wait_for("# ", BOOT);
        session.type_line(SET_PROMPT);
        session.wait_for(PROMPT, 60);
        Shell { session }
    }

    /// Takes over a guest whose init is a shell, and starts one there that has a terminal.
    pub fn at_root(mut session: Session) -> Shell {
        session.wait_for("# ", BOOT);
        session.type_line("setsid -c bash");
        session.wait_for("# ", 60);
        session.type_line(SET_PROMPT);
        session.wait_for(PROMPT, 60);
        Shell { session }
    }

    /// Runs a command; what it prints.
    pub fn run(&mut self, command: &str) -> String {
        self.run_for(command, 120)
    }

    /// The same for one that takes long.
    pub fn run_for(&mut self, command: &str, seconds: u64) -> String {
        self.session.type_line(command);
        let printed = self.session.wait_for(PROMPT, seconds);
        printed.trim_end_matches(PROMPT).replace("\r\n", "\n").trim().to_owned()
    }

    /// Runs a command and looks at the session all the while, twice a second.
    pub fn watch(&mut self, command: &str, seconds: u64, look: impl FnMut(&Session)) -> String {
        self.session.type_line(command);
        let printed = self.session.watch_for(PROMPT, seconds, look);
        printed.trim_end_matches(PROMPT).replace("\r\n", "\n").trim().to_owned()
    }

    /// Types a command that ends the shell.
    pub fn leave(mut self, command: &str) -> Session {
        self.session.type_line(command);
        self.session
    }

    /// The session as it is.
    pub fn into_session(self) -> Session {
        self.session
    }
}
