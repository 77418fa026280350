"""Remote shards from a real S3 service on loopback, through a front that fails, stalls and truncates as it is told."""

import itertools
import json
import multiprocessing
import shutil
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from llmshearing.data.mds import remote as remote_module
from llmshearing.data.mds.remote import Remote
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mixture.loader import build_eval_dataloader, build_train_dataloader
from llmshearing.data.prepare import run as command
from llmshearing.data.prepare.run import prepare
from llmshearing.errors import ShearingError

SEQ, VOCAB = 16, 300
FRACTIONS = {"eval_fraction": 0.3, "for_prune_fraction": 0.3, "progress": False}


class Front(BaseHTTPRequestHandler):
    """Hands requests on to the S3 service, unless `server.mischief(method, path)` names something to do instead."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = HTTPConnection("127.0.0.1", self.server.behind)
        behind.request(self.command, self.path, body or None, dict(self.headers))
        response = behind.getresponse()
        status, headers, body = response.status, response.headers, response.read()
        behind.close()
        mischief = self.server.mischief(self.command, self.path)
        self.server.seen[self.command, self.path] += 1
        if mischief == "refuse":
            status, body = 503, b""
        self.send_response(status)
        whole = len(body)
        if mischief == "short":  # a length that fits: nothing in the protocol tells
            whole = len(body) // 2
        for name, value in headers.items():
            if name.lower() in ("content-length", "connection", "transfer-encoding", "date", "server"):
                continue
            if not (mischief and name.lower().startswith("x-amz-checksum")):  # not every storage has them
                self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", "0") if self.command == "HEAD" else str(whole))
        self.end_headers()
        if self.command == "HEAD":
            return
        if mischief == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif mischief == "drip":
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                if self.server.leaving.wait(0.3):
                    break
        elif mischief == "flip":
            self.wfile.write(body[:-1] + bytes([body[-1] ^ 1]))
        else:
            self.wfile.write(body[:whole])

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def service():
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    front = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    front.daemon_threads = True
    front.behind, front.leaving = moto.get_host_and_port()[1], threading.Event()
    front.handle_error = lambda *_: None  # a client that gave up
    thread = threading.Thread(target=front.serve_forever, daemon=True)
    thread.start()
    yield front
    front.leaving.set()
    front.shutdown()
    front.server_close()
    moto.stop()


@pytest.fixture
def s3(service, monkeypatch):
    """The front, with a bucket `data` that is empty and no mischief."""
    address = f"http://127.0.0.1:{service.server_port}"
    for name, value in {
        "S3_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_module, "BACKOFF", 0.01)
    service.mischief, service.seen = (lambda method, path: None), Counter()
    service.client = boto3.client("s3", endpoint_url=address)
    service.client.create_bucket(Bucket="data")
    yield service
    service.mischief = lambda method, path: None
    for item in service.client.list_objects_v2(Bucket="data").get("Contents", []):
        service.client.delete_object(Bucket="data", Key=item["Key"])


def upload(s3, root):
    for path in root.rglob("*"):
        if path.is_file():
            s3.client.upload_file(str(path), "data", str(path.relative_to(root)))


def only(suffix, mischief, times):
    """Do `mischief` to the first `times` GETs of each file that ends so."""
    seen = Counter()

    def choose(method, path):
        if method != "GET" or not path.split("?")[0].endswith(suffix):
            return None
        seen[path] += 1
        return mischief if seen[path] <= times else None

    return choose


def train(local, names, **more):
    where = {"local": local, "set_names": names, "max_seq_len": SEQ, "vocab_size": VOCAB, "batch_size": 4}
    return build_train_dataloader(**where, split="train", proportion=[0.2, 0.5, 0.3], seed=1, **more)


def rows(spec, batches=17):
    return [
        (domain, sample, ids)
        for b in itertools.islice(spec.dataloader, batches)
        for domain, sample, ids in zip(b["set"].tolist(), b["sample"].tolist(), b["input_ids"].tolist(), strict=True)
    ]


def test_remote_shards_give_the_local_stream_with_and_without_workers(s3, domains, tmp_path):
    root, names = domains
    upload(s3, root)
    expected = rows(train(root, names))
    for workers in (0, 2):
        cache = tmp_path / f"cache{workers}"
        assert rows(train(cache, names, remote="s3://data", num_workers=workers)) == expected
        assert (cache / "train" / "b" / "index.json").is_file() and not list(cache.rglob("*.tmp"))
    spec = build_eval_dataloader(
        local=cache, remote="s3://data", split="eval", set_names=names, batch_size=7, max_seq_len=SEQ, vocab_size=VOCAB
    )
    assert [i for b in spec.dataloader for i in b["sample"].tolist()] == list(range(101))
    before = s3.seen.copy()
    assert rows(train(cache, names, remote="s3://data")) == expected
    again = {path for (method, path), n in s3.seen.items() if method == "GET" and n > before[method, path]}
    assert {path.split("?")[0].rsplit("/", 1)[1] for path in again} <= {
        "index.json",
        "manifest.json",
    }  # shards are kept


@pytest.mark.parametrize("mischief", ["refuse", "cut", "short", "flip", "drip"])
def test_a_bad_download_is_tried_again(s3, domains, tmp_path, mischief, caplog):
    root, names = domains
    upload(s3, root)
    s3.mischief = only("b/shard.00000.mds", mischief, 1)
    waiting = {"download_timeout": 1.0 if mischief == "drip" else 20.0}
    start = time.monotonic()
    assert rows(train(tmp_path / "cache", names, remote="s3://data", **waiting)) == rows(train(root, names))
    assert time.monotonic() - start < 60
    said = {"drip": "took more than 1 seconds", "short": "mds is damaged: 929 bytes", "flip": "mds is damaged: xxh64"}
    assert mischief == "cut" or "trying again" in caplog.text  # boto tries again by itself where a body is cut off
    assert said.get(mischief, "") in caplog.text


@pytest.mark.parametrize("mischief", ["refuse", "cut", "short", "drip"])
def test_a_download_that_stays_bad_is_one_error_and_leaves_nothing_wrong(s3, domains, tmp_path, mischief):
    root, names = domains
    upload(s3, root)
    s3.mischief = only("b/shard.00000.mds", mischief, 100)
    waiting = {"download_timeout": 1.0 if mischief == "drip" else 20.0, "download_retry": 1}
    start = time.monotonic()
    with pytest.raises(ShearingError, match=r"s3://data/train/b/shard.00000.mds could not be downloaded in 2 attempts"):
        rows(train(tmp_path / "cache", names, remote="s3://data", **waiting))
    assert time.monotonic() - start < 60
    assert not (tmp_path / "cache" / "train" / "b" / "shard.00000.mds").exists()
    s3.mischief = lambda method, path: None
    assert rows(train(tmp_path / "cache", names, remote="s3://data")) == rows(train(root, names))


def test_a_bad_download_in_a_worker_is_the_same_error(s3, domains, tmp_path, write_domain):
    root, names = domains
    shutil.rmtree(root / "train" / "b")
    write_domain(root / "train" / "b", "b", 40, 100, shard="400b")
    upload(s3, root)
    s3.mischief = only("b/shard.00003.mds", "short", 100)
    with pytest.raises(ShearingError, match=r"b/shard.00003.mds could not be downloaded") as caught:
        rows(train(tmp_path / "cache", names, remote="s3://data", num_workers=2, download_retry=1))
    assert "Traceback" not in str(caught.value)


def test_what_is_not_there_and_where_nobody_answers(s3, domains, tmp_path, monkeypatch):
    root, names = domains
    upload(s3, root)
    with pytest.raises(ShearingError) as caught:
        train(tmp_path / "cache", ["a", "x", "y"], remote="s3://data", download_retry=0)
    said = str(caught.value)
    assert "s3://data/train/x/index.json" in said and "s3://data/train/y/index.json" in said and "not found" in said
    with pytest.raises(ShearingError, match="no address that Streaming can read"):
        train(tmp_path / "cache", names, remote="s4://data")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ShearingError, match="could not be downloaded in 1 attempts"):
        train(tmp_path / "other", names, remote="s3://data", download_retry=0, download_timeout=5)


def test_a_folder_with_other_data_is_refused(s3, domains, tmp_path, write_domain):
    root, names = domains
    upload(s3, root)
    write_domain(tmp_path / "cache" / "train" / "a", "a", 6)
    with pytest.raises(ShearingError, match=r"train/a/index.json is of other data than s3://data/train/a"):
        train(tmp_path / "cache", names, remote="s3://data")


def test_a_damaged_copy_is_fetched_again(s3, domains, tmp_path):
    root, names = domains
    upload(s3, root)
    expected = rows(train(tmp_path / "cache", names, remote="s3://data"))
    shard = tmp_path / "cache" / "train" / "a" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-3])
    assert rows(train(tmp_path / "cache", names, remote="s3://data")) == expected


def bring(folder, url, results):
    directory = MdsDirectory(folder, SEQ, VOCAB, Remote(url))
    results.put([int(directory[i][0][0]) for i in range(len(directory))])


def test_processes_that_want_the_same_shards_download_each_once(s3, tmp_path, write_domain):
    write_domain(tmp_path / "root" / "a", "a", 60, shard="400b")
    upload(s3, tmp_path / "root")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=bring, args=(tmp_path / "cache", "s3://data/a", results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [list(range(60))] * 3
    for process in processes:
        process.join(10)
    downloads = {path: n for (method, path), n in s3.seen.items() if method == "GET" and "shard" in path}
    assert len(downloads) > 5 and set(downloads.values()) == {1}


# ---- what prepare uploads


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_prepare_uploads_what_training_then_streams(s3, tmp_path, corpus, prepared, tokenizer_file, compression):
    options = {**FRACTIONS, "compression": compression, "remote": "s3://data/v1", "keep_local": False}
    manifest = prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, **options)
    assert not list((tmp_path / "out" / "for_ft").rglob("*.mds*"))
    keys = [item["Key"] for item in s3.client.list_objects_v2(Bucket="data")["Contents"]]
    assert "v1/manifest.json" in keys and "v1/eval_merge/index.json" in keys and not any(".part" in key for key in keys)
    where = {"set_names": ["books", "code"], "max_seq_len": SEQ, "vocab_size": manifest["vocab_size"], "batch_size": 4}
    both = []
    for local, remote in ((prepared, None), (tmp_path / "cache", "s3://data/v1")):
        spec = build_train_dataloader(
            **where, local=local, remote=remote, split="for_ft", proportion=[0.5, 0.5], seed=0
        )
        evaluation = build_eval_dataloader(**where, local=local, remote=remote, split="eval_merge")
        both.append((rows(spec), rows(evaluation, 1000)))
    assert both[0] == both[1]
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == (tmp_path / "out" / "manifest.json").read_bytes()
    assert not list((tmp_path / "cache").rglob("*.zstd"))  # decompressed, and can be had again


def test_an_upload_that_fails_goes_on_later(s3, tmp_path, corpus, tokenizer_file):
    options = {**FRACTIONS, "remote": "s3://data/v1"}
    s3.mischief = lambda method, path: "refuse" if method in ("PUT", "POST") and "for_ft" in path else None
    with pytest.raises(ShearingError, match=r"uploading s3://data/v1/for_ft/books/shard.*same command again"):
        prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, **options)
    s3.mischief = lambda method, path: None
    prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, **options)
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            key = f"v1/{path.relative_to(tmp_path / 'out')}"
            assert s3.client.get_object(Bucket="data", Key=key)["Body"].read() == path.read_bytes()
    with pytest.raises(ShearingError, match="prepared with other remote"):
        prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, **FRACTIONS)
    with pytest.raises(ShearingError, match="uploading s3://nowhere failed"):
        prepare(corpus, tokenizer_file, tmp_path / "o", SEQ, **FRACTIONS, remote="s3://nowhere")


def test_a_folder_as_remote_storage(tmp_path, corpus, tokenizer_file, capfd):
    target = tmp_path / "storage"
    flags = ["--eval_fraction", "0.3", "--for_prune_fraction", "0.3", "--no_progress"]
    argv = ["--input", str(corpus), "--tokenizer", str(tokenizer_file), "--max_seq_len", str(SEQ), *flags]
    assert command.main([*argv, "--output", str(tmp_path / "out"), "--remote", str(target), "--drop_local"]) == 0
    assert json.loads((target / "manifest.json").read_text())["request"]["remote"] == str(target)
    directory = MdsDirectory(tmp_path / "cache", SEQ, VOCAB, Remote(str(target)).below("for_ft/code"))
    assert isinstance(directory[0][0], np.ndarray)
    assert command.main([*argv, "--output", str(tmp_path / "o"), "--drop_local"]) == 1
