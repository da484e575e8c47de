"""HTTP/2 over plaintext (RFC 9113): a server core without gRPC, on one event loop. mesh.rpc serves gRPC on it.

    peer ──frames──> ServerConnection ──request──> Application ──> RequestHandler <──data, disconnected──┐
                            ^──────────── ServerStream: respond, start, send, end, reset ──── ServerConnection

The server is for local peers: the node's Envoy, and programs of this machine. Envoy checks requests from outside.
A connection that breaks the protocol is closed with GOAWAY. TLS, priorities and push are not supported.
mesh.http1 reads HTTP/1.1.

frames      frame types, frame encoding, error codes
headers     HPACK: each distinct field is decoded once, each distinct response head is encoded once
static_table  HPACK's static table
memory_account  bytes held of bodies and of unread responses, with limits and fair shares
peer        base of a server's and a client's connection: frame parsing, settings, PING
connections  the connections of a server, bounded in number
unread      written bytes that a peer does not read
server_connection  server side of a connection: streams, flow control of requests, limits, the end
stream      one request and its response, and the interface of an application
sending     outgoing frames, and flow control of outgoing data
listener    accepts connections at an address, and drains them
"""
