//! DHCP (RFC 2131, 2132): every VM has one address, which it is given however it asks.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};

use super::addresses::Plan;
use super::packet::{self, BROADCAST};
use super::port::Port;

/// The server's port.
pub(super) const SERVER: u16 = 67;
const CLIENT: u16 = 68;
/// The domain of all VMs (reserved for private use by ICANN).
pub(super) const DOMAIN: &str = "internal";
/// Seconds; the address does not change as long as the VM runs.
const LEASE: u32 = 86400;

const OPTION_HOST_NAME: u8 = 12;
const OPTION_DOMAIN: u8 = 15;
const OPTION_MTU: u8 = 26;
const OPTION_CLIENT_ID: u8 = 61;

/// The answer to a client's message, if it gets one.
pub(super) fn answer(port: &Port, plan: &Plan, message: &[u8]) -> Option<Vec<u8>> {
    let request = DhcpPacket::new_checked(message).ok()?;
    let asked = DhcpRepr::parse(&request).ok()?;
    if asked.client_hardware_address.0 != port.mac.0 {
        return None;
    }
    let address = port.addresses.v4;
    let message_type = match asked.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request => {
            let wanted = asked.requested_ip.unwrap_or(asked.client_ip);
            let ours = asked.server_identifier.is_none_or(|server| server == plan.gateway_v4());
            if wanted == address && ours { DhcpMessageType::Ack } else { DhcpMessageType::Nak }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let refused = message_type == DhcpMessageType::Nak;
    let mtu = (packet::MTU as u16).to_be_bytes();
    let mut options = Vec::new();
    // RFC 6842: the client's identifier comes back to it.
    options.extend(request.options().filter(|option| option.kind == OPTION_CLIENT_ID));
    if !refused {
        options.push(DhcpOption { kind: OPTION_HOST_NAME, data: port.name.as_bytes() });
        options.push(DhcpOption { kind: OPTION_DOMAIN, data: DOMAIN.as_bytes() });
        options.push(DhcpOption { kind: OPTION_MTU, data: &mtu });
    }
    let leased = !refused && asked.message_type != DhcpMessageType::Inform;
    let reply = DhcpRepr {
        message_type,
        transaction_id: asked.transaction_id,
        secs: 0,
        client_hardware_address: asked.client_hardware_address,
        client_ip: if refused { Ipv4Addr::UNSPECIFIED } else { asked.client_ip },
        your_ip: if leased { address } else { Ipv4Addr::UNSPECIFIED },
        server_ip: plan.gateway_v4(),
        router: (!refused).then(|| plan.gateway_v4()),
        subnet_mask: (!refused).then(|| plan.mask_v4()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: asked.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(plan.gateway_v4()),
        parameter_request_list: None,
        dns_servers: (!refused).then(|| [plan.gateway_v4()].into_iter().collect()),
        max_size: None,
        lease_duration: leased.then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &options,
    };
    let mut data = vec![0; reply.buffer_len()];
    reply.emit(&mut DhcpPacket::new_unchecked(&mut data[..])).ok()?;
    let to = if asked.client_ip.is_unspecified() { BROADCAST } else { IpAddr::V4(asked.client_ip) };
    let from = SocketAddr::new(plan.gateway_v4().into(), SERVER);
    Some(packet::udp(port.mac, from, SocketAddr::new(to, CLIENT), &data))
}
