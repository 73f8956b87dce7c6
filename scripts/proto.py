"""Generates generated/ from protos/ and checks both. Runs in .venv-proto, without the network.

- generate: write generated/
- check: fail when generated/ differs from the output of `generate`, when buf rejects a proto's
  style or format, or when a proto is incompatible with the last release
- release: record the current protos as the release that later changes must not break
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
from protovalidate import ViolationPb

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
RELEASED = PROTOS / "released.binpb"
GENERATED = ROOT / "generated"
# The contents of generated/ that `generate` writes; the other files are written by hand.
OUTPUTS = ("chathistory", "buf", "chathistory.binpb")
VALIDATE = "buf/validate/validate.proto"
LINT = {"version": "v1", "lint": {"use": ["STANDARD", "COMMENTS"], "ignore": ["buf", "google"]}}
BREAKING = {"version": "v1", "breaking": {"use": ["FILE"], "ignore": ["buf", "google"]}}
INITS = {
    "chathistory": "The ChatHistory API.",
    "chathistory/v1": "Version 1 of the ChatHistory API.",
}


def run(*command: str | Path) -> int:
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def protoc(work: Path, *arguments: str) -> None:
    """Run protoc on our protos and those that they import.

    No Python package has the text of buf/validate/validate.proto, but protovalidate has its
    descriptor.
    """
    known = descriptor_pb2.FileDescriptorSet()
    for module in (descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2):
        known.file.add().ParseFromString(module.DESCRIPTOR.serialized_pb)
    known.file.add().ParseFromString(ViolationPb.desc().file.proto.to_binary())
    descriptors = work / "known.binpb"
    descriptors.write_bytes(known.SerializeToString())
    plugins = [
        f"--plugin={Path(sys.executable).parent / name}"
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    paths = [f"--descriptor_set_in={descriptors}", f"--proto_path={PROTOS}"]
    if run(sys.executable, "-m", "grpc_tools.protoc", *paths, *plugins, *arguments):
        sys.exit(1)


def sources() -> list[str]:
    paths = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    if not paths:
        sys.exit(f"no .proto file under {PROTOS}")
    return paths


def build_image(work: Path, *, comments: bool) -> Path:
    """Write our protos and their imports as one FileDescriptorSet, which buf and grpcurl read."""
    image = work / "image.binpb"
    protoc(
        work,
        f"--descriptor_set_out={image}",
        "--include_imports",
        *["--include_source_info"] * comments,
        *sources(),
    )
    return image


def generate(out: Path) -> None:
    """Write OUTPUTS into the empty folder `out`."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        protoc(work, f"--python_out={out}", f"--mypy_out=quiet:{out}", *sources(), VALIDATE)
        image = descriptor_pb2.FileDescriptorSet.FromString(
            build_image(work, comments=True).read_bytes()
        )
        files = image.file
        # For a file without a service the plugin would write an empty module.
        services = [file.name for file in files if file.service]
        protoc(work, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *services)
        for file in files:
            # The comments are documentation for other languages. The spans of the other elements
            # would only triple the size.
            commented = [
                location for location in file.source_code_info.location if location.leading_comments
            ]
            del file.source_code_info.location[:]
            file.source_code_info.location.extend(commented)
        (out / "chathistory.binpb").write_bytes(image.SerializeToString(deterministic=True))
    for package, summary in INITS.items():
        (out / package / "__init__.py").write_text(
            f'"""{summary} Generated from protos/ by `make proto`: do not edit."""\n'
        )
    # `buf` and `buf.validate` get no __init__.py: they are namespaces, which other distributions
    # may share.
    for package in ("chathistory", "buf/validate"):
        (out / package / "py.typed").touch()


def replace(out: Path) -> None:
    """Replace the outputs in generated/ by those in `out`."""
    for name in OUTPUTS:
        shutil.rmtree(GENERATED / name) if (GENERATED / name).is_dir() else (
            GENERATED / name
        ).unlink(missing_ok=True)
        shutil.move(out / name, GENERATED / name)


def files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in OUTPUTS:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix != ".pyc":
                yield file.relative_to(folder).as_posix(), file.read_bytes()


def check_generated() -> bool:
    """Return whether generated/ is the output of `generate`, and print the files that differ."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        expected, current = dict(files_of(Path(folder))), dict(files_of(GENERATED))
    stale = sorted(name for name in expected | current if expected.get(name) != current.get(name))
    if stale:
        print("generated/ does not match protos/: run `make proto` and commit the files")
        print("\n".join(f"  generated/{name}" for name in stale))
    return not stale


def check_protos() -> bool:
    """Return whether buf accepts the protos; buf prints its findings."""
    buf = Path(sys.executable).parent / "buf"
    with tempfile.TemporaryDirectory() as folder:
        image = build_image(Path(folder), comments=True)
        passed = [
            run(buf, "format", PROTOS, "--diff", "--exit-code") == 0,
            run(buf, "lint", image, "--config", json.dumps(LINT)) == 0,
            run(buf, "breaking", image, "--against", RELEASED, "--config", json.dumps(BREAKING))
            == 0,
        ]
    return all(passed)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        match sys.argv[1:]:
            case ["generate"]:
                generate(Path(folder))
                replace(Path(folder))
            case ["check"]:
                sys.exit(0 if all([check_protos(), check_generated()]) else 1)
            case ["release"]:
                shutil.copyfile(build_image(Path(folder), comments=False), RELEASED)
            case _:
                sys.exit(__doc__)


if __name__ == "__main__":
    main()
