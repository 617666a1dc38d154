//! What is behind a network card, and what users say about it.
//!
//! A card sends packets into a [`Link`] and takes those that arrive from it. [`CountingSink`] is a cable
//! with nobody at its other end. A user-mode network is a process of its own ([`user`]); its links are
//! made by [`Attachment`], in the VM's process.

mod cidr;
mod client;
mod control;
mod link;
mod mac;
mod offload;
mod publish;
mod settings;
mod tap;
mod text;
pub mod user;

pub use cidr::{BadCidr, Cidr};
pub use client::{AttachError, Attachment, Dial};
pub use control::Introduction;
pub use link::{Counters, CountingSink, Link};
pub use mac::Mac;
pub use offload::{
    GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, HEADER, Header, MAX_PACKET, NEEDS_CSUM, Offloads,
};
pub use publish::{BadPublish, Protocol, Publish};
pub use settings::{BadNetwork, NetworkMode, NetworkSettings};
pub use tap::TapLink;
