"""Hostile requests of one caller, and their effect on another one: `make hostile`.

- `attacks` draws the attacks from a seed; `matrix` lists the fields of every RPC, and `kinds` the
  special attacks.
- `attacker` is the process that runs one attack. `http2` writes frames that gRPC's own clients
  never send.
- `probe` is the process of the other user: it measures its own calls and the health check.
- `server` runs the service, and reads its memory; `data` stores what the attacks need.
- `run` measures attack by attack; `soak` runs attackers and ordinary users together.
"""
