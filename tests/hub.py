"""A server on the loopback address that answers as the Hugging Face hub does, for repositories held in memory."""

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`with Hub({"datasets/owner/name": {path: bytes}}) as hub`: hub.url is its HF_ENDPOINT, hub.answers what it said.

    hub.faults {path: [fault, ...]} spoils the next answers to GETs of a file, one each: "half" closes the connection
    in the middle of the body, a number is answered as that status.
    """

    def __init__(self, repos):
        self.repos, self.answers, self.faults = repos, [], {}

    def __enter__(self):
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET(body)

    def do_GET(self, body=b""):
        path = urlsplit(self.path).path.strip("/")
        for repo, files in self.hub.repos.items():
            kind = "" if repo.startswith("datasets/") else "models/"
            if path.startswith(f"api/{kind}{repo}"):
                return self.api(path.removeprefix(f"api/{kind}{repo}").strip("/").split("/"), files, body)
            if path.startswith(f"{repo}/resolve/"):
                return self.resolve(path.removeprefix(f"{repo}/resolve/").partition("/")[2], files)
        self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, "unknown")

    def api(self, what, files, body):
        entries = [{"type": "file", "path": p, "size": len(b), "oid": etag(b)} for p, b in files.items()]
        folders = {p.rpartition("/")[0] for p in files if "/" in p}
        entries += [{"type": "directory", "path": p, "size": 0, "oid": etag(p.encode())} for p in sorted(folders)]
        if what[0] == "tree":
            inside = "/".join(what[2:])
            found = [e for e in entries if inside == "" or e["path"].startswith(inside + "/")]
            if inside and not found:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"}, "tree 404")
            if not inside and "recursive" not in parse_qs(urlsplit(self.path).query):
                found = [e for e in found if "/" not in e["path"]]
            return self.answer(200, json.dumps(found).encode(), {}, "tree")
        if what[0] == "paths-info":
            wanted = set(json.loads(body)["paths"]) if body.startswith(b"{") else set(parse_qs(body.decode())["paths"])
            return self.answer(200, json.dumps([e for e in entries if e["path"] in wanted]).encode(), {}, "paths-info")
        info = {"id": "repo", "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
        info |= {"downloads": 0, "likes": 0, "siblings": [{"rfilename": p} for p in files]}
        return self.answer(200, json.dumps(info).encode(), {}, "info")

    def resolve(self, name, files):
        if name not in files:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"}, "resolve 404")
        content, headers, status = files[name], {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": COMMIT}, 200
        if self.command == "GET" and self.hub.faults.get(name):
            fault = self.hub.faults[name].pop(0)
            if fault != "half":
                return self.answer(fault, b"{}", {}, f"resolve {fault}")
            self.answer(200, content[: len(content) // 2], headers | {"Content-Length": str(len(content))}, "half")
            self.close_connection = True
            return None
        if asked := self.headers.get("Range"):
            begin, end = asked.removeprefix("bytes=").split("-")
            part = content[int(begin) : int(end) + 1 if end else None]
            headers |= {"Content-Range": f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}"}
            content, status = part, 206
        return self.answer(status, content, headers, f"resolve {self.command} {status}")

    def answer(self, status, content, headers, what):
        self.hub.answers.append(what)
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content)), "Content-Type": "application/json"} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def etag(content):
    return hashlib.sha1(content).hexdigest()


def parquet(rows, column="text"):
    """A parquet file with a column of text."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(rows, pa.string())}), buffer)
    return buffer.getvalue()


def card(configs):
    """The README.md of a data set. configs: {name: (folder, splits)}; a split is the files folder/SPLIT-*."""
    lines = ["---", "configs:"]
    for name, (folder, splits) in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {folder}/{split}-*"]
    return "\n".join([*lines, "---", ""]).encode()


EACH = """
import datasets, json, os, runpy, sys
statuses = []
for number, (script, *args) in enumerate(json.loads(sys.argv[1])):
    if not (child := os.fork()):
        os.dup2(os.open(f"{sys.argv[2]}/{number}", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.path[0], sys.argv = os.path.dirname(script), [script, *args]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


def run_each(commands, env):
    """Run commands, each a list [script, argument, ...], and return their [(exit status, standard error)].

    Each is a process of its own, since the hub's libraries read the environment when they are imported. The processes
    are forked from one that has imported the library datasets, which takes seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-c", EACH, json.dumps(commands), folder]
        done = subprocess.run(program, env=env, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
        return [(status, Path(folder, str(i)).read_text()) for i, status in enumerate(json.loads(done.stdout))]
