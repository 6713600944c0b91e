"""A stand-in of a model hub on this machine: its addresses and file layout, without a network.

``python tests/hub.py FOLDER`` serves repositories FOLDER/ORG/NAME, prints its port, and takes
uploads.
"""

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

SHA = "0123456789abcdef0123456789abcdef01234567"  # the one revision of every repository


class Hub(BaseHTTPRequestHandler):
    root: Path

    def reply(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "X-Repo-Commit": SHA} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.listing("/".join(parts[2:4]), parts[4:5])
        if "resolve" in parts:
            file = self.root.joinpath(*parts[:2], *parts[4:])
            if file.is_file():
                data = file.read_bytes()
                tag = f'"{hashlib.sha1(data).hexdigest()}"'
                return self.reply(200, data, ETag=tag)
        self.missing()

    do_HEAD = do_GET

    def listing(self, repo, what):
        files = sorted(path for path in (self.root / repo).rglob("*") if path.is_file())
        if not files:
            return self.missing()
        names = [str(path.relative_to(self.root / repo)) for path in files]
        if what == ["tree"]:
            entries = zip(names, files, strict=True)
            found = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": SHA}
                for name, path in entries
            ]
            return self.reply(200, found)
        siblings = [{"rfilename": name} for name in names]
        self.reply(200, {"id": repo, "sha": SHA, "private": False, "siblings": siblings})

    def missing(self):
        headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}
        self.reply(404, {"error": "Repository not found"}, **headers)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[-2:] == ["repos", "create"]:
            given = json.loads(body)
            name = "/".join(filter(None, [given.get("organization"), given["name"]]))
            if name.endswith("/refused"):
                return self.reply(403, {"error": "You have no right to do that"})
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return self.reply(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if parts == ["api", "validate-yaml"]:  # the card's head
            return self.reply(200, {"errors": [], "warnings": []})
        if "preupload" in parts:
            files = json.loads(body)["files"]
            found = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.reply(200, {"files": found})
        if "commit" in parts:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = self.root.joinpath(*parts[2:4], line["value"]["path"])
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"http://{self.headers['Host']}/{parts[2]}/{parts[3]}/commit/{SHA}"
            return self.reply(200, {"commitUrl": url, "commitOid": SHA, "success": True})
        self.missing()

    def log_message(self, *args):
        if len(sys.argv) > 2:
            print(args[0] % args[1:], file=sys.stderr)


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
