"""A throw-away Slurm cluster in namespaces of its own; it dies with this process.

Started by conftest.py as `unshare --mount --pid --fork --kill-child --net --uts --ipc python
cluster_inside.py FOLDER NODES`. Each node has its own host name, mounts and network (a veth pair on
a bridge), so that a test can cut a link or fill a disk of one node alone. Writes one line of JSON
to stdout (process of each node) and ends when stdin does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HEAD = "10.99.0.1"
DAEMON_SECONDS = 60
CONF = """\
ClusterName=dtrain
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Without the short expiry every requeue waits two minutes.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
SlurmctldPort=17000
SlurmdPort=17001
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=1
MinJobAge=3600
KillWait=5
SlurmdTimeout=20
BatchStartTimeout=10
JobRequeue=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=40
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
NODE = (
    "NodeName=n{i} NodeHostname=n{i} NodeAddr=10.99.0.1{i} CPUs=64 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN\n"
)


def call(*command: object) -> None:
    """Run a command that must succeed."""
    subprocess.run([str(c) for c in command], check=True)


def write_settings(folder: Path, nodes: int) -> None:
    """slurm.conf, pretended GPUs, the munge key."""
    for name in ("etc", "run", "log", "state", "dev", *(f"spool/n{i}" for i in range(nodes))):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = "".join(NODE.format(i=i) for i in range(nodes))
    (folder / "etc/slurm.conf").write_text(lines + CONF.format(head=HEAD, folder=folder))
    for number in range(8):  # a GPU is a path to a character device
        (folder / f"dev/gpu{number}").symlink_to("/dev/null")
    (folder / "etc/gres.conf").write_text(f"Name=gpu File={folder}/dev/gpu[0-7]\n")
    key = folder / "etc/munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)


def network(nodes: int) -> None:
    """A bridge, and names that resolve."""
    call("hostname", "head")
    call("ip", "link", "set", "lo", "up")
    call("ip", "link", "add", "br0", "type", "bridge")
    call("ip", "addr", "add", f"{HEAD}/24", "dev", "br0")
    call("ip", "link", "set", "br0", "up")
    hosts = "127.0.0.1 localhost\n" + f"{HEAD} head\n"
    hosts += "".join(f"10.99.0.1{i} n{i}\n" for i in range(nodes))
    hosts_file = Path("/run/dtrain-hosts")
    call("mount", "-t", "tmpfs", "tmpfs", "/run")
    hosts_file.write_text(hosts)
    call("mount", "--bind", hosts_file, "/etc/hosts")


def start_node(folder: Path, number: int) -> int:
    """Start a slurmd with its own name, mounts and network; return its process."""
    name, conf = f"n{number}", folder / "etc/slurm.conf"
    waits = f"hostname {name}; read go; exec slurmd -D -f {conf} -N {name}"
    log = open(folder / f"log/{name}.log", "w")  # noqa: SIM115 - the node's own
    command = ["unshare", "--net", "--uts", "--mount", "bash", "-c", waits]
    node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    while os.readlink(f"/proc/{node.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    call("ip", "link", "add", f"h{number}", "type", "veth", "peer", "e0", "netns", node.pid)
    call("ip", "link", "set", f"h{number}", "master", "br0", "up")
    inside = ["nsenter", "-t", node.pid, "-n", "ip"]
    call(*inside, "addr", "add", f"10.99.0.1{number}/24", "dev", "e0")
    call(*inside, "link", "set", "e0", "up")
    call(*inside, "link", "set", "lo", "up")
    assert node.stdin is not None
    node.stdin.write(b"go\n")
    node.stdin.flush()
    return node.pid


def main() -> None:
    """Start everything, say so, wait for the end of stdin."""
    folder, nodes = Path(sys.argv[1]), int(sys.argv[2])
    os.environ["SLURM_CONF"] = str(folder / "etc/slurm.conf")
    write_settings(folder, nodes)
    network(nodes)
    run, log = folder / "run", folder / "log"
    munge = [f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"]
    munge += [f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed"]
    call("munged", "--force", f"--key-file={folder}/etc/munge.key", *munge)
    with open(log / "slurmctld.log", "w") as output:
        subprocess.Popen(["slurmctld", "-D", "-c"], stdout=output, stderr=output)
    processes = [start_node(folder, number) for number in range(nodes)]
    deadline = time.monotonic() + DAEMON_SECONDS
    while time.monotonic() < deadline:
        asked = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        if len(asked.stdout.split()) == nodes:
            break
        time.sleep(0.2)
    else:
        sys.exit(f"the nodes are not idle after {DAEMON_SECONDS} s: {asked.stdout}{asked.stderr}")
    print(json.dumps(processes), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
