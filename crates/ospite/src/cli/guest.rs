//! The grammar of the commands that go through the guest's agent.

use clap::Args;
use clap_complete::ArgValueCompleter;

use crate::completions::{vm_names, vm_places};
use crate::output::OutputArgs;

const EXEC_EXAMPLES: &str = "\
Examples:
  ospite exec web -- systemctl status nginx
  ospite exec -u www-data -e LANG=C web ls -l
  ospite exec db -- sh -c 'pg_dump shop | gzip' > shop.sql.gz
  ospite exec db -- psql shop < changes.sql

The exit code is the command's; 128 and the signal's number where one killed it; 255 where ospite
failed. Ctrl-C interrupts the command in the guest, a second one kills it. The guest needs the
package qemu-guest-agent.";

const CP_EXAMPLES: &str = "\
Examples:
  ospite cp site/ web:/var/www
  ospite cp web:/var/log/nginx/error.log .

Modes and symbolic links are kept; in the guest all belongs to root. The guest needs tar and the
package qemu-guest-agent.";

/// `ospite exec`
#[derive(Args, Debug)]
#[command(after_help = EXEC_EXAMPLES)]
pub struct ExecArgs {
    /// The VM, or the path of its agent socket (with a slash)
    #[arg(add = ArgValueCompleter::new(vm_names))]
    pub vm: String,

    /// A variable for the command's environment; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<String>,

    /// The user of the guest that runs it [default: root]
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,

    /// The folder to run it in [default: the user's home]
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,

    /// Leave our standard input alone; the command's is empty
    #[arg(short, long)]
    pub no_stdin: bool,

    /// How long to wait for the guest's agent, which a guest that boots has yet to start
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub wait: u64,

    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `ospite cp`
#[derive(Args, Debug)]
#[command(after_help = CP_EXAMPLES)]
pub struct CpArgs {
    /// What to copy: a file or folder of the host, or VM:/PATH in a guest
    #[arg(value_name = "SOURCE", add = ArgValueCompleter::new(vm_places))]
    pub source: String,

    /// Where to: into it if it is a folder, else under this name
    #[arg(value_name = "DESTINATION", add = ArgValueCompleter::new(vm_places))]
    pub destination: String,

    /// How long to wait for the guest's agent, which a guest that boots has yet to start
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub wait: u64,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// A shell could not take another name.
fn variable(text: &str) -> Result<String, String> {
    let name = text.split_once('=').map_or("", |(name, _)| name);
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    let sound = name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit());
    if sound { Ok(text.into()) } else { Err("NAME=VALUE it must be, NAME of letters, digits and _".into()) }
}
