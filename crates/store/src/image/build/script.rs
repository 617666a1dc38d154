//! The scripts of a build: they run as root in its namespace.

use crate::image::{File, Recipe, User};

/// Runs before the packages but the essential ones are installed.
pub(super) const ESSENTIAL: &str = include_str!("essential.sh");
/// Makes the disk.
pub(super) const PACK: &str = include_str!("pack.sh");
const BASE: &str = include_str!("base.sh");

/// What of each package is left out: nobody reads it in a VM, and it is a third of the files.
pub(super) const LEFT_OUT: &[(&str, &str)] = &[
    ("path-exclude", "/usr/share/man/*"),
    ("path-exclude", "/usr/share/info/*"),
    ("path-exclude", "/usr/share/locale/*"),
    ("path-exclude", "/usr/share/doc/*"),
    ("path-include", "/usr/share/doc/*/copyright"),
];

/// The name of the recipe's file number `index`, beside the scripts.
pub(super) fn file_name(index: usize) -> String {
    format!("file.{index}")
}

/// The script that makes the installed system the one of the recipe. It may hold passwords: they are never
/// on a command line.
pub(super) fn customize(recipe: &Recipe, uuid: &str) -> String {
    let hostname = quote(recipe.hostname.as_deref().unwrap_or_default());
    let autologin = if recipe.autologin { "yes" } else { "no" };
    let mut script = format!("root=$1 uuid={uuid} hostname={hostname} autologin={autologin}\n{BASE}");
    script.push_str("export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n");
    script.extend(recipe.password.as_deref().map(|password| set_password("root", password)));
    script.push_str(&authorize("root", &recipe.ssh_keys));
    script.extend(recipe.users.iter().map(user));
    script.extend(recipe.files.iter().enumerate().map(|(index, entry)| file(index, entry)));
    script.extend(recipe.run.iter().map(|command| run(command)));
    script
}

fn user(user: &User) -> String {
    let name = quote(&user.name);
    let mut script = format!("chroot \"$root\" useradd --create-home --shell /bin/bash {name}\n");
    for group in user.groups.iter().map(|group| quote(group)) {
        script += &format!(
            "chroot \"$root\" groupadd --force {group}\nchroot \"$root\" usermod --append --groups {group} {name}\n"
        );
    }
    script.extend(user.password.as_deref().map(|password| set_password(&user.name, password)));
    script + &authorize(&user.name, &user.ssh_keys)
}

fn set_password(user: &str, password: &str) -> String {
    format!("printf '%s\\n' {} | chroot \"$root\" chpasswd\n", quote(&format!("{user}:{password}")))
}

fn authorize(user: &str, keys: &[String]) -> String {
    if keys.is_empty() {
        return String::new();
    }
    let place = "home=$(getent passwd \"$0\" | cut -d: -f6); install -d -m 700 -o \"$0\" -g \"$0\" \"$home/.ssh\"; \
                 cat >\"$home/.ssh/authorized_keys\"; chown \"$0:\" \"$home/.ssh/authorized_keys\"; \
                 chmod 600 \"$home/.ssh/authorized_keys\"";
    let keys = quote(&keys.join("\n"));
    format!("printf '%s\\n' {keys} | chroot \"$root\" sh -euc {} {}\n", quote(place), quote(user))
}

/// Symbolic links in the path are the guest's own: it is followed inside.
fn file(index: usize, file: &File) -> String {
    let place = "mkdir -p \"$(dirname \"$0\")\"; cat >\"$0\"; chown \"$1\" \"$0\"; chmod \"$2\" \"$0\"";
    let (to, owner) =
        (quote(&file.to.to_string_lossy()), quote(file.owner.as_deref().unwrap_or("root:root")));
    format!(
        "chroot \"$root\" sh -euc {} {to} {owner} {} <{}\n",
        quote(place),
        quote(file.mode()),
        file_name(index)
    )
}

fn run(command: &str) -> String {
    let title = quote(command.lines().next().unwrap_or_default());
    format!("printf 'step: running: %s\\n' {title} >&2\nchroot \"$root\" sh -euc {}\n", quote(command))
}

/// As one word of a shell's.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn whatever_a_recipe_says_is_one_word_to_the_shell() {
        for text in ["plain", "it's", "$(reboot) `x` \\ \"", "two\nlines", ""] {
            let output =
                Command::new("sh").args(["-c", &format!("printf %s {}", quote(text))]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
        }
    }

    #[test]
    fn the_script_is_one_that_a_shell_reads_and_holds_the_steps_in_order() {
        let recipe: Recipe = serde_json::from_str(
            r#"{"packages":["nginx"],"password":"it's","ssh-keys":["ssh-ed25519 A a"],"hostname":"web",
                "autologin":true,"users":[{"name":"ada","groups":["sudo"],"password":"x"}],
                "files":[{"content":"","to":"/etc/a b","mode":"0600","owner":"ada"}],"run":["echo 'hi'\nid"]}"#,
        )
        .unwrap();
        let script = customize(&recipe, "1234");
        let steps = ["uuid=1234", "chpasswd", "useradd", "/etc/a b", "file.0", "step: running"];
        let places: Vec<usize> =
            steps.map(|step| script.find(step).unwrap_or_else(|| panic!("{step}"))).into();
        assert!(places.is_sorted(), "{places:?}");
        for script in [&script, ESSENTIAL, PACK] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("script");
            std::fs::write(&path, script).unwrap();
            let output = Command::new("sh").arg("-n").arg(&path).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}
