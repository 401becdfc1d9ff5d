"""`spiking-mlp prepare` on small archives, and what it wrote."""

from spiking_mlp_jax.cli import main as cli
from spiking_mlp_jax.data.prepare import imagenet
from spiking_mlp_jax.data.prepare.records import prepare
from tests.support.archives import tar, train_files, train_tar, val_files

NAME, VERSION = "imagenet2012", "5.1.0"


def nothing(*_):
    pass


def listed(path):
    return imagenet.list_train(path, nothing)


def write(listing, out, **options):
    options = {"jpeg_only": True, "shard_bytes": 6_000, "workers": 2} | options
    return prepare([listing], out, NAME, VERSION, **options)


def shards(out, name=NAME):
    return {path.name: path.read_bytes() for path in sorted(out.glob(f"{name}/*/{name}-*"))}


def command(*arguments):
    return cli.main(["prepare", *map(str, arguments)])


def records(folder, split):
    """As anyone reads them with TFDS, undecoded."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def write_archives(folder):
    """The folder, with small archives of training and validation images."""
    (folder / "train.tar").write_bytes(train_tar(train_files()))
    (folder / "val.tar").write_bytes(tar(val_files()))
    return folder
