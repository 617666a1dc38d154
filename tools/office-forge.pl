# Root in a guest that wants to be somebody else: frames with MAC, IP and ARP addresses that are not its own,
# at the others and at the host, and connections to where it may not go.
#
# Usage: perl - SECONDS OTHERS HOST-PORT HOST-ADDRESS    (OTHERS: addresses of VMs, with commas)
use strict;
use warnings;
use Socket;

my ($seconds, $others, $port, $host) = @ARGV;
my @others = split /,/, $others;
my ($card) = map { m{([^/]+)$} } grep { !m{/lo$} } glob '/sys/class/net/*';
sub of_card { open my $file, '<', "/sys/class/net/$card/$_[0]" or die; local $/; my $text = <$file>; chomp $text; $text }
my ($index, $own) = (of_card('ifindex'), pack('H*', of_card('address') =~ tr/://dr));
my ($gateway, $gateway_mac) = (inet_aton('10.200.0.1'), pack('H*', '52550ac80001'));
socket(my $raw, 17, 3, 0x0300) or die "no packet socket: $!"; # AF_PACKET, every protocol
my $to = pack 'S n i S C C a8', 17, 0x0800, $index, 0, 0, 6, "\xff" x 8;

sub sum { my $sum = 0; $sum += $_ for unpack 'n*', $_[0] . (length($_[0]) % 2 ? "\0" : ''); $sum = ($sum & 0xffff) + ($sum >> 16) while $sum >> 16; ~$sum & 0xffff }
sub ip {
    my ($from, $to, $protocol, $data) = @_;
    my $head = pack 'C C n n n C C n a4 a4', 0x45, 0, 20 + length $data, int rand 65536, 0, 64, $protocol, 0, $from, $to;
    substr($head, 10, 2) = pack 'n', sum($head);
    $head . $data
}
sub syn {
    my ($from, $to, $port) = @_;
    my $tcp = pack 'n n N N n n n n', 1024 + int rand 60000, $port, int rand 2**32, 0, 0x5002, 65535, 0, 0;
    substr($tcp, 16, 2) = pack 'n', sum($from . $to . pack('n n', 6, length $tcp) . $tcp);
    ip($from, $to, 6, $tcp)
}
sub udp { my ($from, $to, $port) = @_; ip($from, $to, 17, pack('n n n n', 4000, $port, 16, 0) . 'forged!!') }
sub ping { my ($from, $to) = @_; my $echo = pack 'C C n n n a8', 8, 0, 0, 1, 1, 'forged!!'; substr($echo, 2, 2) = pack 'n', sum($echo); ip($from, $to, 1, $echo) }
sub arp { my ($operation, $mac, $from, $to) = @_; pack 'n n C C n a6 a4 a6 a4', 1, 0x800, 6, 4, $operation, $mac, $from, "\0" x 6, $to }

my @forged = map { inet_aton $_ } '10.200.0.1', '127.0.0.1', $host, '8.8.8.8', '255.255.255.255', @others;
my @targets = map { inet_aton $_ } '10.200.0.1', '127.0.0.1', $host, @others;
my ($sent, $tried, $through, $end) = (0, 0, 0, time + $seconds);
while (time < $end) {
    for (1 .. 50) {
        my ($from, $target) = ($forged[rand @forged], $targets[rand @targets]);
        my $mac = rand() < 0.5 ? $own : join '', map { chr int rand 256 } 1 .. 6;
        my $what = int rand 5;
        my $frame = $what == 0 ? arp(1 + int rand 2, $mac, $from, $target) : $what == 1 ? syn($from, $target, $port)
            : $what == 2 ? udp($from, $target, $port) : $what == 3 ? ping($from, $target)
            : join '', map { chr int rand 256 } 1 .. int rand 200;
        my $type = $what == 0 ? 0x806 : rand() < 0.9 ? 0x800 : 0x86dd;
        $sent++ if send $raw, (rand() < 0.5 ? $gateway_mac : "\xff" x 6) . $mac . pack('n', $type) . $frame, 0, $to;
    }
    # What a plain program would try: the host by each of its names, and ports of the others.
    for my $target ('10.200.0.1', $host, @others) {
        socket(my $tcp, PF_INET, SOCK_STREAM, 0) or next;
        my $wanted = $target eq '10.200.0.1' || $target eq $host ? $port : 1 + int rand 1024;
        setsockopt $tcp, SOL_SOCKET, SO_SNDTIMEO, pack 'l! l!', 0, 50_000;
        $tried++;
        $through++ if connect($tcp, pack_sockaddr_in($wanted, inet_aton $target)) && ($target eq '10.200.0.1' || $target eq $host);
    }
}
print "$sent forged frames, $tried connections tried, $through to the host came through\n";
exit($through > 0);
