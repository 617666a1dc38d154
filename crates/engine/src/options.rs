//! What people choose about an engine.

/// The choices for one engine: text, until the engine takes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The engine's own options, by name.
    pub values: Vec<(String, String)>,
    /// Keep [`Statistics`](crate::Statistics), which costs the guest some time.
    pub statistics: bool,
}
