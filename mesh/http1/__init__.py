"""HTTP/1.1 (RFC 9112) beside HTTP/2, for the same applications: requests are streams of mesh.h2.

    first bytes ──preface of HTTP/2──> mesh.h2.ServerConnection
         └── any other ──> Http1Connection ──Http1Stream──> Application

httptools (llhttp) reads requests, strictly: it accepts one framing only. A connection serves one request at a time. The
memory account, the limit of connections, and the rules for peers without progress are those of mesh.h2.

requests    one request as httptools reads it: its head, its body, and the rules that httptools leaves to servers
connection  a connection: the turn of each request, its response, timeouts, the end
"""
