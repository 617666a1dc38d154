#!/usr/bin/env python3
"""The clients of tools/test-office.sh: who asks the three services, does harm to one VM, and keeps the record.

Every request's result is a line of JSON in the record. For each harm: the two other services are asked without
it, with it, without it, with it; none of their requests may be lost, and the medians of their times are compared.
What the harmed service acknowledged, before and meanwhile, must be there when it is back.
"""

import ftplib
import hashlib
import imaplib
import io
import json
import os
import smtplib
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

PATIENCE = 30  # seconds for one request
GAP = 0.05  # seconds between two
CANARY = 47113  # a port of this host that no guest may reach
OSPITE, RECORD = sys.argv[1:3]
WINDOW = float(os.environ.get("OSPITE_OFFICE_WINDOW", "12"))
TURNS = int(os.environ.get("OSPITE_OFFICE_TURNS", "2"))
LIMIT = float(os.environ.get("OSPITE_OFFICE_LIMIT", "1.10"))
TRIALS = 3  # a median above the limit is measured again so often, and judged with all that was measured
ALONE = 180  # seconds in which a VM comes back with nobody's help
HARMS = {"panic": "mail", "forkbomb": "web", "leak": "ftp", "fulldisk": "mail", "scan": "web", "kill": "ftp"}


class Web:
    """Fetches the page."""

    def ask(self):
        with urllib.request.urlopen("http://127.0.0.1:8080/", timeout=PATIENCE) as page:
            assert b"office is open" in page.read(), "another page"

    def check(self):
        self.ask()
        return 0


class Ftp:
    """Uploads a file and fetches it again."""

    def __init__(self):
        self.kept = {}

    def session(self):
        ftp = ftplib.FTP(timeout=PATIENCE)
        ftp.connect("127.0.0.1", 2121)
        ftp.login("ada", "office")
        return ftp

    def ask(self):
        data, name = os.urandom(50_000), f"file-{len(self.kept) % 40}-{threading.get_ident() % 1000}"
        with self.session() as ftp:
            self.kept.pop(name, None)  # from here on, neither the old nor the new one is certain
            ftp.storbinary(f"STOR {name}", io.BytesIO(data))
            self.kept[name] = hashlib.sha256(data).digest()
            assert self.fetch(ftp, name) == self.kept[name], f"{name} came back as another file"

    @staticmethod
    def fetch(ftp, name):
        sum = hashlib.sha256()
        ftp.retrbinary(f"RETR {name}", sum.update)
        return sum.digest()

    def check(self):
        with self.session() as ftp:
            for name, sum in self.kept.items():
                assert self.fetch(ftp, name) == sum, f"{name} was acknowledged and is another file"
        return len(self.kept)


class Mail:
    """Sends a mail, and looks into the mailbox."""

    def __init__(self):
        self.kept = {}

    def ask(self):
        word, body = os.urandom(8).hex(), os.urandom(3000).hex()
        text = f"From: me@example.org\r\nTo: ada@office.example\r\nSubject: {word}\r\n\r\n"
        text += "\r\n".join(body[at : at + 60] for at in range(0, len(body), 60)) + "\r\n"
        with smtplib.SMTP("127.0.0.1", 2525, timeout=PATIENCE) as smtp:
            smtp.sendmail("me@example.org", ["ada@office.example"], text)
            self.kept[word] = hashlib.sha256(body.encode()).digest()
        with self.mailbox() as imap:
            imap.select("INBOX", readonly=True)

    @staticmethod
    def mailbox():
        imap = imaplib.IMAP4("127.0.0.1", 1143, timeout=PATIENCE)
        imap.login("ada", "office")
        return imap

    def check(self):
        missing, damaged, deadline = set(self.kept), set(), time.monotonic() + 300
        # What was accepted while the disk was full is put off, and may be on its way for minutes.
        while missing and time.monotonic() < deadline:
            with self.mailbox() as imap:
                imap.select("INBOX", readonly=True)
                for part in imap.fetch("1:*", "(BODY.PEEK[])")[1]:
                    if isinstance(part, tuple):
                        head, _, body = part[1].decode().partition("\r\n\r\n")
                        word = head.rpartition("Subject: ")[2].split("\r\n")[0]
                        sum = hashlib.sha256(body.replace("\r\n", "").encode()).digest()
                        if word in missing and sum == self.kept[word]:
                            missing.discard(word)
                        elif word in missing:
                            damaged.add(f"{word}: {len(body)} bytes")
            time.sleep(1 if missing else 0)
        told = f"{len(missing)} of {len(self.kept)} acknowledged mails are not there: {missing}"
        assert not missing, f"{told}; there, but not as they were: {damaged or 'none'}"
        return len(self.kept)


SERVICES = {"web": Web(), "ftp": Ftp(), "mail": Mail()}
record_lock = threading.Lock()


def record(**what):
    with record_lock, open(RECORD, "a", encoding="utf-8") as file:
        file.write(json.dumps({"t": round(time.time(), 3), **what}) + "\n")


class Customer(threading.Thread):
    """Asks services in turn, one request at a time; `phase` says what for."""

    def __init__(self, *services):
        super().__init__(daemon=True)
        self.services, self.over, self.phase = services, False, "warm-up"
        self.times, self.lost = {}, []
        self.start()

    def run(self):
        while not self.over:
            for service in self.services:
                self.ask(service)
                time.sleep(GAP)

    def ask(self, service):
        phase, begun, why = self.phase, time.monotonic(), None
        try:
            SERVICES[service].ask()
        except Exception as error:  # whatever it is, the request is lost
            why = repr(error)
        took = time.monotonic() - begun
        # What ended in another phase than it began in counts for the first: else the slow ones would be missed.
        if why is None:
            self.times.setdefault((service, phase), []).append(took)
        else:
            self.lost.append(f"{service}, {phase}: {why}")
        record(service=service, phase=phase, ms=round(took * 1000, 1), lost=why)

    def stop(self):
        self.over = True
        self.join()


class Canary(threading.Thread):
    """Listens where no guest may come, and counts who does."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen = []
        self.tcp = socket.create_server(("", CANARY))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("", CANARY))
        self.start()
        threading.Thread(target=self.packets, daemon=True).start()

    def run(self):
        while True:
            self.seen.append(("tcp", self.tcp.accept()[1]))

    def packets(self):
        while True:
            self.seen.append(("udp", self.udp.recvfrom(100)[1]))


def ospite(*words, **options):
    return subprocess.run([OSPITE, *words], capture_output=True, text=True, check=False, **options)


def inside(vm, script, seconds=30):
    try:
        return ospite("exec", "-n", vm, "--", "sh", "-c", script, timeout=seconds).stdout
    except subprocess.TimeoutExpired:
        return "no answer"


def info(vm):
    return json.loads(ospite("info", "--json", vm).stdout)


def unit(seconds, command):
    """A command in the background, which systemd ends."""
    return f"systemd-run --quiet --collect -p RuntimeMaxSec={seconds} -p TasksMax=infinity -p OOMPolicy=continue {command}"


def begin(what, vm):
    """Does harm, for WINDOW seconds where it lasts; who does it may be the first to suffer, and not answer."""
    seconds = int(WINDOW)
    if what == "panic":
        inside(vm, "echo 1 >/proc/sys/kernel/sysrq; (sleep 0.5; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &")
    elif what == "forkbomb":
        inside(vm, unit(seconds, "sh -c 'f() { f | f & }; f; sleep 1000'"), WINDOW / 2)
    elif what == "leak":
        inside(vm, unit(seconds, "sh -c 'while true; do tail -c 2G /dev/zero; done'"), WINDOW / 2)
    elif what == "fulldisk":
        inside(vm, "fallocate -l $(($(df --output=avail -k /var/tmp | tail -n 1) - 200000))K /var/tmp/most")
        inside(vm, unit(seconds, "--unit full sh -c 'while true; do dd if=/dev/zero of=/var/tmp/full bs=1M; sync; done'"), WINDOW / 2)
    elif what == "scan":
        others = ",".join(address(other) for other in SERVICES if other != vm)
        ospite("cp", os.path.join(os.path.dirname(__file__), "office-forge.pl"), f"{vm}:/run/forge.pl", timeout=60)
        inside(vm, unit(seconds + 5, f"sh -c '>/run/forged; perl /run/forge.pl {seconds} {others} {CANARY} {lan()} >>/run/forged 2>&1'"))
    elif what == "kill":
        os.kill(info(vm)["pid"], 9)


def lift(what, vm):
    """Somebody makes room again; nobody is needed for the others."""
    if what == "fulldisk":
        inside(vm, "systemctl stop full; rm -f /var/tmp/full /var/tmp/most; sync")


def end(what, vm):
    if what == "scan":
        told = inside(vm, "for n in $(seq 40); do grep . /run/forged && break; sleep 0.5; done").strip()
        print(f"    from inside: {told}", flush=True)
        assert " 0 to the host came through" in told, "the host was reached"


def address(vm):
    return inside(vm, "ip -4 -o addr show scope global").split("inet ")[1].split("/")[0]


def lan():
    """An address of this host that others in its network know."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def back(vm, seconds):
    """Waits until a VM does its work; how long that took, or None."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        try:
            SERVICES[vm].ask()
            return time.monotonic() - begun
        except Exception:  # not yet
            time.sleep(0.5)
    return None


def trial(what, vm, times):
    """One harm in one VM, in turns; adds to `times`, and returns what is wrong."""
    wrong, others = [], Customer(*(name for name in SERVICES if name != vm))
    victims = Customer(vm)
    time.sleep(3)
    for turn in range(TURNS):
        others.phase = "without"
        time.sleep(WINDOW)
        others.phase = "with"
        record(harm=what, vm=vm, turn=turn, load=os.getloadavg()[0])
        until = time.monotonic() + WINDOW
        begin(what, vm)
        time.sleep(max(0, until - time.monotonic()))
        others.phase = "after"
        victims.stop()  # what it lost meanwhile is its own; what it acknowledged is not
        try:
            print(f"    {vm} {recovered(what, vm)}", flush=True)
        except Exception as error:  # whatever it is
            wrong.append(f"{vm}, after {what}: {error!r}")
        victims = Customer(vm)
    victims.stop()
    others.stop()
    for (service, phase), taken in others.times.items():
        times.setdefault((service, phase), []).extend(taken)
    return wrong + [f"lost: {lost}" for lost in others.lost]


def recovered(what, vm):
    """Waits until a VM is back, and looks for all that it has ever acknowledged."""
    lift(what, vm)
    took, how = back(vm, ALONE), "is back"
    if took is None:
        ospite("restart", vm, "--timeout", "20")
        took, how = back(vm, ALONE), f"({info(vm)['state']}) had to be restarted by hand, and is back"
    assert took is not None, "it is not back"
    end(what, vm)
    return f"{how} {took:.1f} s after, with all of {SERVICES[vm].check()} acknowledged files or mails"


def judge(what, vm, times):
    """Prints the medians; the services that are slower than they may be."""
    slow = []
    for service in SERVICES:
        without, during = (times.get((service, when), []) for when in ("without", "with"))
        if service == vm or not without or not during:
            continue
        medians = [statistics.median(taken) * 1000 for taken in (without, during)]
        ratio = medians[1] / medians[0]
        counts = f"{len(without)} and {len(during)} requests"
        print(f"    {service}: {medians[0]:.1f} ms without, {medians[1]:.1f} ms with: {ratio:.3f} ({counts})", flush=True)
        record(harm=what, vm=vm, service=service, without=medians[0], during=medians[1], ratio=ratio)
        if ratio > LIMIT or min(len(without), len(during)) < 5:
            slow.append(f"{service} is {ratio:.2f} times as slow while {vm} has a {what} ({counts})")
    return slow


def main():
    wanted = sys.argv[3:] or list(HARMS)
    canary, wrong = Canary(), []
    for name in SERVICES:
        if back(name, ALONE) is None:
            sys.exit(f"{name} does not do its work")
    for what in wanted:
        vm, times = HARMS[what], {}
        for _ in range(TRIALS):
            print(f"{what} in {vm}; load of this machine {os.getloadavg()[0]:.1f}", flush=True)
            wrong += trial(what, vm, times)
            slow = judge(what, vm, times)
            if not slow:
                break
        wrong += slow
    if canary.seen:
        wrong.append(f"this host was reached: {canary.seen[:5]}")
    for line in wrong:
        print(f"  WRONG: {line}", flush=True)
    sys.exit(1 if wrong else 0)


main()
