//! The calls behind it (`linux/if_tun.h`, `linux/sockios.h`, netdevice(7)).
#![allow(unsafe_code)] // ioctls: the kernel reads and writes what they point to

use std::os::fd::AsFd;

use rustix::io::{Errno, Result};
use rustix::ioctl::{IntegerSetter, Setter, Updater, ioctl};

use crate::Offloads;

const TUNSETIFF: u32 = 0x4004_54ca;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNSETVNETLE: u32 = 0x4004_54dc;
const SIOCGIFFLAGS: u32 = 0x8913;
const SIOCSIFFLAGS: u32 = 0x8914;
const SIOCGIFINDEX: u32 = 0x8933;
const SIOCBRADDIF: u32 = 0x89a2;

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_UP: u16 = 1;

const TUN_F_CSUM: usize = 1;
const TUN_F_TSO4: usize = 2;
const TUN_F_TSO6: usize = 4;

/// `struct virtio_net_hdr_mrg_rxbuf`.
const HEADER: u32 = 12;

/// `struct ifreq`: a name, and a union as long as its longest member.
#[repr(C, align(8))]
struct Request {
    name: [u8; 16],
    data: [u8; 24],
}

impl Request {
    fn new(name: &str) -> Result<Request> {
        let mut request = Request { name: [0; 16], data: [0; 24] };
        // The kernel wants the 0 at its end.
        let room = request.name[..15].get_mut(..name.len()).ok_or(Errno::INVAL)?;
        room.copy_from_slice(name.as_bytes());
        Ok(request)
    }

    fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.data[0], self.data[1]])
    }

    fn set_flags(&mut self, flags: u16) {
        self.data[..2].copy_from_slice(&flags.to_ne_bytes());
    }
}

/// Calls with a `struct ifreq`.
fn request<const CODE: u32>(fd: impl AsFd, request: &mut Request) -> Result<()> {
    // SAFETY: all callers' calls read and write one `struct ifreq`, which is as long as `Request` is.
    unsafe { ioctl(fd, Updater::<CODE, Request>::new(request)) }
}

/// Makes `tun` the interface `name`.
pub(crate) fn take(tun: impl AsFd, name: &str) -> Result<()> {
    let mut interface = Request::new(name)?;
    interface.set_flags(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR);
    request::<TUNSETIFF>(&tun, &mut interface)?;
    // SAFETY: both read an `int`.
    unsafe {
        ioctl(&tun, Setter::<TUNSETVNETHDRSZ, u32>::new(HEADER))?;
        ioctl(&tun, Setter::<TUNSETVNETLE, u32>::new(1))
    }
}

/// What may be read from `tun`.
pub(crate) fn offload(tun: impl AsFd, offloads: Offloads) -> Result<()> {
    let bit = |has, bit| if has { bit } else { 0 };
    let flags = bit(offloads.checksum, TUN_F_CSUM)
        | bit(offloads.checksum && offloads.tso4, TUN_F_TSO4)
        | bit(offloads.checksum && offloads.tso6, TUN_F_TSO6);
    // SAFETY: the argument is a number, which points to nothing.
    unsafe { ioctl(tun, IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags)) }
}

/// The interface's number.
pub(crate) fn index(control: impl AsFd, name: &str) -> Result<[u8; 4]> {
    let mut interface = Request::new(name)?;
    request::<SIOCGIFINDEX>(control, &mut interface)?;
    let [a, b, c, d, ..] = interface.data;
    Ok([a, b, c, d])
}

/// Brings it up, if it is down.
pub(crate) fn bring_up(control: impl AsFd, name: &str) -> Result<()> {
    let mut interface = Request::new(name)?;
    request::<SIOCGIFFLAGS>(&control, &mut interface)?;
    if interface.flags() & IFF_UP != 0 {
        return Ok(());
    }
    interface.set_flags(interface.flags() | IFF_UP);
    request::<SIOCSIFFLAGS>(&control, &mut interface)
}

/// Puts an interface in a bridge.
pub(crate) fn add_to_bridge(control: impl AsFd, name: &str, bridge: &str) -> Result<()> {
    let member = index(&control, name)?;
    let mut interface = Request::new(bridge)?;
    interface.data[..4].copy_from_slice(&member);
    request::<SIOCBRADDIF>(control, &mut interface)
}
