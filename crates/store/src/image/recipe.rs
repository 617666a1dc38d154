//! What an image is made of.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::manifest::hex;
use crate::Size;

/// What an image is made of, beyond Debian's minimal system with kernel, systemd and guest agent. Steps
/// come in this order: packages, users, files, commands.
///
/// As TOML:
/// ```toml
/// packages = ["nginx"]
/// run = ["systemctl enable nginx"]
/// size = "4G"
/// [[files]]
/// to = "/var/www/html/index.html"
/// content = "<h1>hello</h1>"
/// [[users]]
/// name = "ada"
/// ssh-keys = ["ssh-ed25519 AAAA... ada"]
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Recipe {
    /// Debian's release, by code name.
    pub release: String,
    /// Debian packages.
    pub packages: Vec<String>,
    /// Users besides root.
    pub users: Vec<User>,
    /// Files that are put in.
    pub files: Vec<File>,
    /// Shell commands that root runs in the image, in order; the first that fails ends the build. No
    /// service runs then.
    pub run: Vec<String>,
    /// The disk's size.
    pub size: Size,
    /// The guest's own name, where a VM gives it none.
    pub hostname: Option<String>,
    /// root's password. Without one nobody can log in as root by a password.
    pub password: Option<String>,
    /// Who may log in as root over SSH, as lines of `authorized_keys`.
    pub ssh_keys: Vec<String>,
    /// root is logged in on the serial console without being asked for a password.
    pub autologin: bool,
}

/// A user of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct User {
    /// The login name.
    pub name: String,
    /// The password; without one there is none to log in by.
    pub password: Option<String>,
    /// Further groups.
    pub groups: Vec<String>,
    /// Lines of `authorized_keys`.
    pub ssh_keys: Vec<String>,
}

/// A file of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// The host's file that it is a copy of,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// or its text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Where it goes: an absolute path. Folders are made.
    pub to: PathBuf,
    /// Its mode in octal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// `USER` or `USER:GROUP`, by name; root without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// Why a recipe is none.
#[derive(Debug, thiserror::Error)]
pub enum Bad {
    /// A word that cannot be what it is given as.
    #[error("{word:?} is no {what}")]
    Word {
        /// What it is given as.
        what: &'static str,
        /// The word.
        word: String,
    },
    /// A file with two sources, or none.
    #[error("the file {} takes either `from`, a file of the host, or `content`, its text", to.display())]
    Source {
        /// Where it would go.
        to: PathBuf,
    },
    /// A file that is not there.
    #[error("cannot read the file {}", from.display())]
    Read {
        /// The host's file.
        from: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Default for Recipe {
    fn default() -> Recipe {
        Recipe {
            release: "bookworm".into(),
            packages: Vec::new(),
            users: Vec::new(),
            files: Vec::new(),
            run: Vec::new(),
            size: Size::from(8 << 30),
            hostname: None,
            password: None,
            ssh_keys: Vec::new(),
            autologin: false,
        }
    }
}

/// Changes whenever the same recipe makes another image.
const BUILDER: &str = "ospite image 1";

impl Recipe {
    /// Makes relative names of the host's files relative to `folder`: that of the file that the recipe is in.
    pub fn relative_to(&mut self, folder: &Path) {
        for from in self.files.iter_mut().filter_map(|file| file.from.as_mut()) {
            *from = folder.join(&from);
        }
    }

    /// What it makes, as 64 hexadecimal digits: the same for the same recipe and the same content of the
    /// host's files in it, whatever these are called.
    ///
    /// # Errors
    /// Where it is no recipe, or a file cannot be read.
    pub fn digest(&self) -> Result<String, Bad> {
        self.check()?;
        let mut plain = self.clone();
        for file in &mut plain.files {
            if let Some(from) = file.from.take() {
                let content = fs::read(&from).map_err(|source| Bad::Read { from, source })?;
                file.content = Some(format!("sha256:{}", hex(&Sha256::digest(content))));
            } else if let Some(text) = &file.content {
                file.content = Some(format!("sha256:{}", hex(&Sha256::digest(text))));
            }
        }
        // Field by field in the order of the struct.
        let text = serde_json::to_string(&plain).unwrap_or_default();
        Ok(hex(&Sha256::digest(format!("{BUILDER}\n{text}"))))
    }

    /// Whether everything in it is what it should be.
    ///
    /// # Errors
    /// The first thing that is not.
    pub fn check(&self) -> Result<(), Bad> {
        word("Debian release", &self.release, is_release)?;
        self.packages.iter().try_for_each(|package| word("package", package, is_package))?;
        self.hostname.iter().try_for_each(|name| word("host name", name, is_host))?;
        self.ssh_keys.iter().try_for_each(|key| word("SSH key", key, is_line))?;
        self.password.iter().try_for_each(|password| word("password", password, is_line))?;
        self.run.iter().try_for_each(|command| word("command", command, |text| !text.contains('\0')))?;
        self.users.iter().try_for_each(User::check)?;
        self.files.iter().try_for_each(File::check)
    }
}

impl User {
    fn check(&self) -> Result<(), Bad> {
        word("user name", &self.name, is_user)?;
        self.groups.iter().try_for_each(|group| word("group", group, is_user))?;
        self.ssh_keys.iter().try_for_each(|key| word("SSH key", key, is_line))?;
        self.password.iter().try_for_each(|password| word("password", password, is_line))
    }
}

impl File {
    /// The mode that it gets.
    pub fn mode(&self) -> &str {
        self.mode.as_deref().unwrap_or("0644")
    }

    fn check(&self) -> Result<(), Bad> {
        let to = self.to.to_string_lossy();
        let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
        word("absolute path for a file", &to, |text| {
            self.to.is_absolute()
                && self.to.components().all(plain)
                && self.to.file_name().is_some()
                && !text.ends_with('/')
                && is_line(text)
        })?;
        if self.from.is_some() == self.content.is_some() {
            return Err(Bad::Source { to: self.to.clone() });
        }
        self.mode.iter().try_for_each(|mode| word("mode in octal digits", mode, is_mode))?;
        self.owner.iter().try_for_each(|owner| word("owner", owner, is_owner))
    }
}

fn word(what: &'static str, word: &str, good: impl Fn(&str) -> bool) -> Result<(), Bad> {
    if good(word) { Ok(()) } else { Err(Bad::Word { what, word: word.into() }) }
}

fn all_of(text: &str, first: impl Fn(char) -> bool, rest: impl Fn(char) -> bool) -> bool {
    text.len() <= 200 && text.chars().next().is_some_and(&first) && text.chars().all(|c| first(c) || rest(c))
}

fn is_release(text: &str) -> bool {
    all_of(text, |c| c.is_ascii_lowercase(), |c| c == '-')
}

/// `NAME[:ARCH][=VERSION]` or `NAME/RELEASE`, as apt takes it (Debian policy 5.6.1, 5.6.12).
fn is_package(text: &str) -> bool {
    all_of(text, |c| c.is_ascii_alphanumeric(), |c| "+-.:=~/".contains(c)) && !text.ends_with('-')
}

fn is_host(text: &str) -> bool {
    text.len() <= 63 && all_of(text, |c| c.is_ascii_alphanumeric(), |c| c == '-')
}

fn is_user(text: &str) -> bool {
    text.len() <= 32
        && all_of(text, |c| c.is_ascii_lowercase() || c == '_', |c| c == '-' || c.is_ascii_digit())
}

fn is_owner(text: &str) -> bool {
    let (user, group) = text.split_once(':').unwrap_or((text, text));
    is_user(user) && is_user(group)
}

fn is_mode(text: &str) -> bool {
    (3..=4).contains(&text.len()) && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit))
}

fn is_line(text: &str) -> bool {
    !text.is_empty() && !text.contains(|c: char| c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(json: &str) -> Recipe {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_same_recipe_has_the_same_digest_and_another_another() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("a", "1"), ("b", "1"), ("c", "2")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let from = |name: &str| {
            let mut recipe = recipe(&format!(r#"{{"files":[{{"from":"{name}","to":"/x"}}]}}"#));
            recipe.relative_to(folder.path());
            recipe.digest().unwrap()
        };
        assert_eq!(from("a"), from("b"), "what counts is what is in the file");
        assert_ne!(from("a"), from("c"));
        let text = recipe(r#"{"files":[{"content":"1","to":"/x"}]}"#);
        assert_eq!(text.digest().unwrap(), from("a"));
        assert_ne!(
            recipe(r#"{"packages":["nginx"]}"#).digest().unwrap(),
            Recipe::default().digest().unwrap()
        );
        assert_eq!(recipe("{}"), Recipe::default());
        let missing = recipe(r#"{"files":[{"from":"/no/such","to":"/x"}]}"#).digest().unwrap_err();
        assert!(missing.to_string().contains("/no/such"));
    }

    #[test]
    fn what_could_be_taken_for_something_else_is_refused() {
        for good in [
            r#"{"packages":["g++","libc6:amd64","nginx=1.22.1-9+deb12u3","foo/bookworm-backports"]}"#,
            r#"{"users":[{"name":"ada","groups":["sudo"],"ssh-keys":["ssh-ed25519 AAAA ada"]}],"hostname":"web"}"#,
            r#"{"files":[{"content":"","to":"/etc/x","mode":"0755","owner":"ada:www-data"}],"size":"4G"}"#,
        ] {
            recipe(good).check().unwrap();
        }
        for bad in [
            r#"{"packages":["-oAPT::x=1"]}"#,
            r#"{"packages":["a b"]}"#,
            r#"{"packages":["a,b"]}"#,
            r#"{"packages":[""]}"#,
            r#"{"release":"../x"}"#,
            r#"{"users":[{"name":"ada:0"}]}"#,
            r#"{"users":[{"name":"ada","password":"a\nroot:x"}]}"#,
            r#"{"files":[{"content":"","to":"etc/x"}]}"#,
            r#"{"files":[{"content":"","to":"/../x"}]}"#,
            r#"{"files":[{"content":"","to":"/"}]}"#,
            r#"{"files":[{"to":"/x"}]}"#,
            r#"{"files":[{"content":"","from":"/y","to":"/x"}]}"#,
            r#"{"files":[{"content":"","to":"/x","mode":"rwx"}]}"#,
            r#"{"hostname":"-x"}"#,
        ] {
            assert!(recipe(bad).check().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Recipe>(r#"{"package":["x"]}"#).is_err(), "a slip of the pen");
    }
}
