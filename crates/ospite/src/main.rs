//! The command line: parse, call, print, attach the console.

use std::panic::catch_unwind;

use clap::Parser;

mod agent_socket;
mod at_once;
mod cli;
mod completions;
mod confine;
mod console;
mod cp;
mod doctor;
mod exec;
mod exit;
mod failure;
mod guest;
mod image;
mod logger;
mod man;
mod network;
mod office;
mod output;
mod panics;
mod plain;
mod run;
mod seed;
mod signals;
mod vm_process;
mod vms;

use cli::{Cli, Command};
use failure::Failure;
use vms::{autostart, commands, keeper};

fn main() {
    completions::answer_shells();
    panics::prepare();
    let cli = Cli::parse();
    logger::start(cli.verbose);
    let outcome = catch_unwind(|| dispatch(cli.command));
    let code = match outcome {
        Ok(Ok(code)) => code,
        Ok(Err(failure)) => failure.tell(),
        Err(_) => exit::Code::Internal, // the panic has said what it was
    };
    std::process::exit(code.number());
}

fn dispatch(command: Command) -> Result<exit::Code, Failure> {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Image(command) => image::image(&command),
        Command::Create(args) => commands::create(&args),
        Command::Start(which) => commands::start(&which),
        Command::Stop(args) => commands::stop(&args),
        Command::Restart(args) => commands::restart(&args),
        Command::Kill(which) => commands::kill(&which),
        Command::Rm(args) => commands::rm(&args),
        Command::List(args) => commands::list(&args),
        Command::Info(args) => commands::info_of(&args),
        Command::Logs(args) => commands::logs(&args),
        Command::Console(args) => commands::console(&args),
        Command::Autostart(args) => autostart::autostart(&args),
        Command::VmKeeper(args) => keeper::keep(&args.name),
        Command::VmProcess(args) => vm_process::run(&args.name),
        Command::Exec(args) => exec::exec(&args),
        Command::Cp(args) => cp::cp(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Completions(args) => completions::completions(&args),
        Command::Up(args) => office::up(&args),
        Command::Down(args) => office::down(&args),
        Command::Ps(args) => office::ps(&args),
        Command::Man(args) => man::man(&args),
        Command::NetworkProcess(args) => network::process(args),
        Command::NetworkDialer(args) => network::dialer::process(&args),
    }
}
