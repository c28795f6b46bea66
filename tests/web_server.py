"""A web server on this machine, whose answers a test chooses."""

import contextlib
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """Answers each path with its replies in turn, and with the last one from then on."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.replies = {}
        self.hits = Counter()
        self.released = threading.Event()

    def handle_error(self, request, client_address):
        """A client that has heard enough is no error."""

    def url(self, path, *replies):
        self.replies[path] = list(replies)
        return f'http://127.0.0.1:{self.server_port}{path}'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        replies = self.server.replies[self.path]
        reply = replies[min(self.server.hits[self.path], len(replies) - 1)]
        self.server.hits[self.path] += 1
        reply(self)

    def log_message(self, *args):
        pass


def sends(body=BODY, status=200, length=None, **headers):
    def reply(handler):
        handler.send_response(status)
        if length != 'none':
            handler.send_header('Content-Length', str(len(body) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace('_', '-'), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def hangs_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(2)


def stalls(handler):
    handler.server.released.wait(10)
    hangs_up(handler)


@contextlib.contextmanager
def running():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()
