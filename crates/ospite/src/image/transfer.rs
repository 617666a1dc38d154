//! `ospite image import` and `export`

use store::Home;
use store::image::{self, Boot, Image};

use super::progress::Watched;
use super::{failure, show};
use crate::cli::{ExportArgs, ExportFormat, ImportArgs};
use crate::exit::Code;
use crate::failure::Failure;

/// Makes an image of a file.
pub fn import(home: &Home, args: &ImportArgs) -> Result<Code, Failure> {
    let ImportArgs { kernel, initrd, append, .. } = args;
    let boot = Boot { kernel: kernel.clone(), initrd: initrd.clone(), cmdline: append.clone() };
    let mut watched = Watched::new()?;
    let imported = image::import(home, &args.name, &args.file, &boot, &mut |progress| watched.hear(progress));
    let image = watched.end(imported)?;
    show::one(home, &image, args.output)
}

/// Makes a file of an image.
pub fn export(home: &Home, args: &ExportArgs) -> Result<Code, Failure> {
    let image = Image::open(home, &args.name).map_err(failure)?;
    let export = match args.format {
        ExportFormat::Tar => image::export,
        ExportFormat::Qcow2 => image::export_qcow2,
        ExportFormat::Raw => image::export_raw,
    };
    let mut watched = Watched::new()?;
    let exported = export(&image, &args.file, &mut |progress| watched.hear(progress));
    watched.end(exported)?;
    Ok(Code::Success)
}
