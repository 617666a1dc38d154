//! Crates use only the crates that the plan lets them use.

use crate::manifests::Crate;
use crate::plan::MAY_USE;

/// The forbidden arrows, one sentence each.
pub fn check(crates: &[Crate]) -> Vec<String> {
    crates.iter().flat_map(check_crate).collect()
}

fn check_crate(krate: &Crate) -> Vec<String> {
    let name = &krate.name;
    let Some((_, allowed)) = MAY_USE.iter().find(|(room, _)| room == name) else {
        return vec![format!("crate `{name}` is not in the plan; give it a row in crates/xtask/src/plan.rs")];
    };
    let forbidden = krate.uses.iter().filter(|used| !allowed.contains(&used.as_str()));
    forbidden
        .map(|used| format!("crate `{name}` may not use `{used}` (may use: {})", list(allowed)))
        .collect()
}

fn list(allowed: &[&str]) -> String {
    if allowed.is_empty() { "no crate of ours".into() } else { allowed.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn krate(name: &str, uses: &[&str]) -> Crate {
        Crate {
            name: name.into(),
            dir: "/nowhere".into(),
            uses: uses.iter().map(|&u| u.to_owned()).collect(),
        }
    }

    #[test]
    fn an_arrow_that_points_up_or_sideways_is_named() {
        let problems = check(&[
            krate("chipset", &["device", "virtio"]),
            krate("engine", &["mem"]),
            krate("mem", &["engine"]),
        ]);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("`chipset` may not use `virtio`"));
        assert!(problems[1].contains("`mem` may not use `engine` (may use: no crate of ours)"));
    }

    #[test]
    fn a_crate_without_a_place_in_the_plan_is_named() {
        assert!(check(&[krate("attic", &[])])[0].contains("`attic` is not in the plan"));
    }

    #[test]
    fn the_plan_itself_has_no_circles() {
        for (index, (room, uses)) in MAY_USE.iter().enumerate() {
            for used in *uses {
                let place = MAY_USE.iter().position(|(other, _)| other == used);
                assert!(place.is_some_and(|p| p < index), "`{room}` comes before `{used}` in the plan");
            }
        }
    }
}
