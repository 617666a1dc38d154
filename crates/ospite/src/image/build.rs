//! `ospite image build`

use std::fs;
use std::path::Path;

use store::Home;
use store::image::{self, File, Image, Recipe};

use super::progress::Watched;
use super::show;
use crate::cli::BuildArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::logger::say;

/// Builds it, and says what it has become.
pub fn build(home: &Home, args: &BuildArgs) -> Result<Code, Failure> {
    let recipe = recipe(args)?;
    let digest = recipe.digest().map_err(|error| Failure::from_error(Code::Build, &error))?;
    let there = Image::open(home, &args.name).ok();
    if let Some(image) = there
        .filter(|image| args.if_changed && image.manifest.recipe_digest.as_deref() == Some(digest.as_str()))
    {
        return show::one(home, &image, args.output);
    }
    let mut watched = Watched::new()?;
    let built = image::build(home, &args.name, &recipe, &mut |progress| watched.hear(progress));
    let image = watched.end(built)?;
    if recipe.password.is_none()
        && !recipe.autologin
        && recipe.users.iter().all(|user| user.password.is_none())
    {
        say("nobody can log in at its console: --password or --autologin lets root in");
    }
    show::one(home, &image, args.output)
}

/// The recipe in the file, and what the options add.
fn recipe(args: &BuildArgs) -> Result<Recipe, Failure> {
    let mut recipe = match &args.recipe {
        None => Recipe::default(),
        Some(path) => read(path)?,
    };
    recipe.packages.extend_from_slice(&args.packages);
    recipe.run.extend_from_slice(&args.run);
    recipe.autologin |= args.autologin;
    recipe.size = args.size.unwrap_or(recipe.size);
    recipe.hostname = args.hostname.clone().or(recipe.hostname);
    recipe.password = args.password.clone().or(recipe.password);
    for (from, to) in &args.files {
        let mode = mode(from)?;
        recipe.files.push(File { from: Some(from.clone()), to: to.clone(), mode, ..File::default() });
    }
    for path in &args.ssh_keys {
        let keys = text(path)?;
        let lines = keys.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        recipe.ssh_keys.extend(lines.map(Into::into));
    }
    Ok(recipe)
}

fn read(path: &Path) -> Result<Recipe, Failure> {
    let mut recipe: Recipe = toml::from_str(&text(path)?).map_err(|error| {
        Failure::new(Code::Build, format!("{} is no recipe: {error}", path.display()))
            .hint("ospite image build --help shows one")
    })?;
    recipe.relative_to(path.parent().unwrap_or(Path::new("")));
    Ok(recipe)
}

fn text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path)
        .map_err(|error| Failure::new(Code::Build, format!("cannot read {}: {error}", path.display())))
}

/// A program stays one.
fn mode(from: &Path) -> Result<Option<String>, Failure> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = fs::metadata(from).ok().filter(fs::Metadata::is_file);
    let metadata = metadata.ok_or_else(|| {
        Failure::new(Code::Build, format!("{} is not a file that can be read", from.display()))
    })?;
    Ok(Some(format!("{:04o}", metadata.permissions().mode() & 0o777)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command, ImageCommand};
    use clap::Parser;

    fn args(line: &[&str]) -> BuildArgs {
        let words = ["ospite", "image", "build", "web"].iter().chain(line);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Image(ImageCommand::Build(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_add_to_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let page = write("index.html", "hello");
        let key = write("id.pub", "# mine\nssh-ed25519 AAAA ada\n");
        let file = write(
            "web.toml",
            "packages = ['nginx']\nsize = '4G'\n[[files]]\nfrom = 'index.html'\nto = '/page'\n\
             [[users]]\nname = 'ada'\n",
        );
        let copied = format!("{page}:/copy");
        let line =
            ["--recipe", &file, "--package", "curl", "--run", "true", "--file", &copied, "--ssh-key", &key];
        let recipe = recipe(&args(&line)).unwrap();
        assert_eq!(recipe.packages, ["nginx", "curl"]);
        assert_eq!((recipe.size.bytes(), recipe.run.len(), recipe.users.len()), (4 << 30, 1, 1));
        assert_eq!(recipe.ssh_keys, ["ssh-ed25519 AAAA ada"]);
        assert_eq!(recipe.files[0].from.as_deref(), Some(Path::new(&page)), "beside the recipe");
        assert_eq!(recipe.files[1].to, Path::new("/copy"));
        recipe.check().unwrap();
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("web.toml");
        fs::write(&file, "package = ['nginx']\n").unwrap();
        let failure = recipe(&args(&["--recipe", file.to_str().unwrap()])).unwrap_err();
        let text = format!("{failure:?}");
        assert!(text.contains("web.toml") && text.contains("unknown field `package`"), "{text}");
        assert!(format!("{:?}", recipe(&args(&["--file", "/no/such:/x"])).unwrap_err()).contains("/no/such"));
    }
}
