"""Makes generated/ from protos/ and checks both. Runs in .venv-proto; nothing here needs the network.

- generate: write generated/ anew
- check: fail when generated/ is not what protos/ give, when buf finds fault with a proto's style or format, or when a
  proto breaks users of the last release
- release: take the protos of now as the release that later changes must not break
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
# What `generate` owns in generated/; the rest is written by hand.
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
    """Run protoc on our protos with protovalidate's at hand.

    buf/validate/validate.proto is in no Python package as text, but protovalidate carries its descriptor.
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
    found = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    if not found:
        sys.exit(f"no .proto file under {PROTOS}")
    return found


def build_image(work: Path, *, comments: bool) -> Path:
    """Our protos with all that they import, as one FileDescriptorSet: what buf and grpcurl read."""
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
        # Of a file without a service the plugin makes an empty module.
        services = [file.name for file in files if file.service]
        protoc(work, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *services)
        for file in files:
            # The comments are documentation for other languages. The spans of the other elements
            # would only triple the size.
            commented = [at for at in file.source_code_info.location if at.leading_comments]
            del file.source_code_info.location[:]
            file.source_code_info.location.extend(commented)
        (out / "chathistory.binpb").write_bytes(image.SerializeToString(deterministic=True))
    for package, says in INITS.items():
        (out / package / "__init__.py").write_text(
            f'"""{says} Generated from protos/ by `make proto`: do not edit."""\n'
        )
    # `buf` and `buf.validate` get no __init__.py: other distributions may have a part in these namespaces.
    for package in ("chathistory", "buf/validate"):
        (out / package / "py.typed").touch()


def replace(out: Path) -> None:
    """Put what was generated in `out` in the place of what is in generated/."""
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
    """Whether generated/ is what `generate` would write now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, there = dict(files_of(Path(folder))), dict(files_of(GENERATED))
    stale = sorted(name for name in fresh | there if fresh.get(name) != there.get(name))
    if stale:
        print("generated/ is not what protos/ give: run `make proto` and commit what it writes")
        print("\n".join(f"  generated/{name}" for name in stale))
    return not stale


def check_protos() -> bool:
    """Whether buf has nothing to say about the protos."""
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
