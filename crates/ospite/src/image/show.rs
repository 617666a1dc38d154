//! `ospite image list` and `info`

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use store::image::{self, Image, Manifest, Origin};
use store::{Home, Name, Size};

use super::failure;
use crate::cli::{InfoArgs, ListArgs};
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::OutputArgs;

/// An image as programs see it.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    manifest: Manifest,
    folder: std::path::PathBuf,
    bytes_on_host: u64,
    vms: Vec<Name>,
}

fn shown(home: &Home, image: &Image) -> Shown {
    let mut manifest = image.manifest.clone();
    manifest.name = image.name.clone(); // an exported one may have got another here
    let vms = image::users(home, &image.name);
    Shown { manifest, folder: image.folder.clone(), bytes_on_host: image.bytes_on_host(), vms }
}

/// Prints all images.
pub fn list(home: &Home, args: &ListArgs) -> Result<Code, Failure> {
    let images = Image::list(home).map_err(failure)?;
    let images: Vec<Shown> = images.iter().map(|image| shown(home, image)).collect();
    args.output.print(&images, |images| table(images))?;
    Ok(Code::Success)
}

fn table(images: &[Shown]) -> String {
    if images.is_empty() {
        return "no images yet; this makes one: ospite image build debian\n".into();
    }
    let widest = images.iter().map(|image| image.manifest.name.as_str().len()).max().unwrap_or(0).max(4);
    let mut text =
        format!("{:widest$}  {:24} {:>9} {:>9}  {:>8}  VMS\n", "NAME", "ORIGIN", "DISK", "ON HOST", "AGE");
    for Shown { manifest, bytes_on_host, vms, .. } in images {
        let vms = vms.iter().map(Name::as_str).collect::<Vec<_>>().join(" ");
        let (disk, host, age) =
            (Size::from(manifest.size).to_string(), mib(*bytes_on_host), age(manifest.created));
        let line = format!(
            "{:widest$}  {:24} {disk:>9} {host:>9}  {age:>8}  {vms}",
            manifest.name,
            origin(manifest)
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// Prints an image.
pub fn info(home: &Home, args: &InfoArgs) -> Result<Code, Failure> {
    let image = Image::open(home, &args.name).map_err(failure)?;
    if args.verify {
        image.verify().map_err(failure)?;
    }
    let shown = shown(home, &image);
    args.output.print(&shown, |shown| page(&image, shown, args.packages))?;
    Ok(Code::Success)
}

/// Prints an image that has just been made.
pub fn one(home: &Home, image: &Image, output: OutputArgs) -> Result<Code, Failure> {
    output.print(&shown(home, image), |shown| page(image, shown, false))?;
    Ok(Code::Success)
}

fn page(image: &Image, shown: &Shown, packages: bool) -> String {
    let manifest = &shown.manifest;
    let release = manifest.kernel_release.as_deref().unwrap_or("of unknown release");
    let initrd = image.initrd().map(|path| path.display().to_string());
    let vms = shown.vms.iter().map(Name::as_str).collect::<Vec<_>>().join(" ");
    let lines = [
        ("image", manifest.name.to_string()),
        ("origin", format!("{}, {} ago", origin(manifest), age(manifest.created))),
        ("architecture", manifest.architecture.clone()),
        (
            "disk",
            format!(
                "{} ({}, {} on the host)",
                image.disk().display(),
                Size::from(manifest.size),
                mib(shown.bytes_on_host)
            ),
        ),
        ("kernel", format!("{} ({release})", image.kernel().display())),
        ("initrd", initrd.unwrap_or_else(|| "none".into())),
        ("command line", manifest.cmdline.clone()),
        ("packages", manifest.packages.len().to_string()),
        ("disk's SHA-256", manifest.disk.sha256.clone()),
        ("recipe", manifest.recipe_digest.clone().unwrap_or_else(|| "none".into())),
        ("VMs on it", if vms.is_empty() { "none".into() } else { vms }),
    ];
    let mut text = String::new();
    for (what, value) in lines {
        let _ = writeln!(text, "{what:15} {value}");
    }
    for (name, version) in manifest.packages.iter().filter(|_| packages) {
        let _ = writeln!(text, "  {name} {version}");
    }
    text
}

fn origin(manifest: &Manifest) -> String {
    match &manifest.origin {
        Origin::Debian { release } => format!("Debian {release}"),
        Origin::Imported { file } => format!("from {file}"),
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

fn age(created: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match now.saturating_sub(created) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_told_in_units_that_people_count_in() {
        let now = UNIX_EPOCH.elapsed().unwrap().as_secs();
        assert_eq!(age(now + 100), "0 s");
        assert_eq!(age(now - 600), "10 min");
        assert_eq!(age(now - 3 * 86_400), "3 days");
    }
}
