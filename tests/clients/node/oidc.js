// A real OpenID provider for the tests: node oidc.js PORT, with its private keys as a JWK set on stdin.
// It gives the client `app` (secret `app-secret`) a token for the audience `models` by client_credentials.
const { Provider } = require("oidc-provider");

const port = Number(process.argv[2]);
const jwks = JSON.parse(require("fs").readFileSync(0));
const resource = { audience: "models", scope: "use", accessTokenFormat: "jwt", accessTokenTTL: 7200, jwt: { sign: { alg: "RS256" } } };
const provider = new Provider(`http://127.0.0.1:${port}`, {
  jwks,
  clients: [{ client_id: "app", client_secret: "app-secret", grant_types: ["client_credentials"], redirect_uris: [], response_types: [] }],
  extraTokenClaims: () => ({ org: { id: "acme" }, job: "user", may: ["*"] }),
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    resourceIndicators: { enabled: true, defaultResource: () => "urn:models", getResourceServerInfo: () => resource },
  },
});
provider.listen(port, "127.0.0.1");
