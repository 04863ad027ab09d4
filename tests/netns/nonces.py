"""``python nonces.py INTERFACE FIRST_PORT LANES``: the nonces of all records that pass an interface, until SIGTERM.

Frames come with a virtio-net header (PACKET_VNET_HDR), so that a superpacket of the kernel is cut into the datagrams
it stands for.  Prints one JSON line when it listens, and one at the end.
"""

from __future__ import annotations

import collections
import json
import signal
import socket
import struct
import sys
import time

SOL_PACKET, PACKET_VNET_HDR, PACKET_STATISTICS = 263, 15, 6
ETH_P_ALL, SO_RCVBUFFORCE = 3, 33
VNET, ETHERNET = struct.Struct("<BBHHHH"), 14
INTERVAL = 0.1


def datagrams(frame: memoryview) -> tuple[str, int, list[memoryview]]:
    """(source address, destination port, UDP payloads) of a frame; no payloads if it is not UDP over IPv4."""
    _flags, gso_type, _header, gso_size, _start, _offset = VNET.unpack_from(frame)
    packet = frame[VNET.size + ETHERNET :]
    if len(packet) < 28 or packet[0] >> 4 != 4 or packet[9] != 17:
        return "", 0, []
    header = (packet[0] & 15) * 4
    length = int.from_bytes(packet[2:4], "big")
    payload = packet[header + 8 : length]
    port = int.from_bytes(packet[header + 2 : header + 4], "big")
    step = gso_size if gso_type & 0x7F == 5 else len(payload)
    cut = [payload[start : start + step] for start in range(0, len(payload), max(step, 1))]
    return socket.inet_ntoa(packet[12:16]), port, cut


def main() -> None:
    interface, first, lanes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 256 << 20)
    listener.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    listener.bind((interface, ETH_P_ALL))
    listener.settimeout(INTERVAL)
    over: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: over.append(True))
    print(json.dumps({"listening": True}), flush=True)
    seen: set[bytes] = set()
    repeated: list[str] = []
    data: collections.Counter[str] = collections.Counter()
    last_data: dict[str, float] = {}
    buffer = memoryview(bytearray(1 << 17))
    while not over:
        try:
            length = listener.recv_into(buffer)
        except TimeoutError:
            continue
        source, port, found = datagrams(buffer[:length])
        if not found or not first <= port < first + lanes:
            continue
        for datagram in found:
            if len(datagram) < 32 or datagram[0] != 0x10:
                continue
            nonce = bytes(datagram[4:16])
            if nonce in seen:
                repeated.append(nonce.hex())
            seen.add(nonce)
            if not nonce[11] & 0x80:
                name = f"{source} lane {nonce[3] & 15}"
                data[name] += 1
                last_data[name] = time.clock_gettime(time.CLOCK_BOOTTIME)
    _seen, missed = struct.unpack("II", listener.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    print(json.dumps({
        "records": len(seen), "repeated": repeated, "missed": missed,
        "keys": len({nonce[:4] for nonce in seen}), "data": data, "last_data": last_data,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
