"""HTTP/2 over plaintext (RFC 9113): a server core that knows no gRPC, and a gRPC client. One thread, one loop.

    peer ──frames──> Connection ──request──> Application ──> RequestHandler <──data, disconnected── Connection
                         ^──────────────────── ServerStream: respond, start, send, end, reset ─────────┘

The server is for local peers: the Envoy beside it, and programs of this machine. Envoy checks requests from outside.
A connection that breaks the protocol is closed with GOAWAY. TLS, HTTP/1, priorities and push are not supported.

frames      frame types, frame encoding, error codes
headers     HPACK: each distinct field is decoded once, each distinct response head is encoded once
peer        the part that a server's and a client's connection share: frame parsing, settings, PING
connection  the server's side of a connection: streams, flow control of requests, limits, the end
stream      one request and its response, and the interface of an application
sending     outgoing frames, and flow control of outgoing data
listener    accepts connections at an address, and drains them
client      gRPC calls to the Envoy beside it
"""
