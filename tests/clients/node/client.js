// A Node client: @grpc/grpc-js and our .proto files, loaded at run time. Prints what it saw as one JSON document.
//
//     node client.js HOST:PORT PROTO_FOLDER    (models: `double`, x [N,4] FP32 -> y = 2x; `patient`; `repeat`, decoupled)
"use strict";
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, folder] = process.argv.slice(2);
const definition = loader.loadSync("shoal/inference/v2/inference.proto", {
  includeDirs: [folder],
  keepCase: true,
  longs: String,
  defaults: true,
});
const { inference } = grpc.loadPackageDefinition(definition);
const limits = { "grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1 };
const client = new inference.GRPCInferenceService(address, grpc.credentials.createInsecure(), limits);

function floats(values) {
  return Buffer.from(Float32Array.from(values).buffer);
}

function numbers(raw) {
  return Array.from(new Float32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length)));
}

function request(model, values, more = {}) {
  const input = { name: "x", datatype: "FP32", shape: [values.length / 4, 4] };
  return { model_name: model, inputs: [input], raw_input_contents: [floats(values)], ...more };
}

function call(method, message, options = {}, metadata = new grpc.Metadata()) {
  return new Promise((resolve) => {
    client[method](message, metadata, options, (error, answer) =>
      resolve(error ? { code: error.code, details: error.details } : answer),
    );
  });
}

function cancelled() {
  return new Promise((resolve) => {
    const running = client.ModelInfer(request("patient", [1, 2, 3, 4]), (error) => resolve(error.code));
    setImmediate(() => running.cancel());
  });
}

function stream(requests) {
  return new Promise((resolve) => {
    const seen = [];
    const running = client.ModelStreamInfer();
    running.on("data", (answer) => seen.push(answer.error_message || numbers(answer.infer_response.raw_output_contents[0])));
    running.on("error", (error) => resolve({ code: error.code, seen }));
    running.on("end", () => resolve(seen));
    for (const message of requests) running.write(message);
    running.end();
  });
}

async function main() {
  const ones = [1, 1, 1, 1];
  const tenant = new grpc.Metadata();
  tenant.set("x-shoal-tenant", "node");
  const answer = await call("ModelInfer", request("double", [1, 2, 3, 4], { id: "n1" }), {}, tenant);
  const typed = await call("ModelInfer", {
    model_name: "double",
    inputs: [{ name: "x", datatype: "FP32", shape: [1, 4], contents: { fp32_contents: [1, 2, 3, 4] } }],
    parameters: { priority: { uint64_param: "1" }, timeout: { int64_param: "20000000" } },
  });
  const many = await Promise.all(
    Array.from({ length: 100 }, (_, n) => call("ModelInfer", request("double", [n, n, n, n]))),
  );
  const wide = Array.from({ length: 2000000 }, (_, n) => n % 1000);
  const large = await call("ModelInfer", request("wide", wide));
  const metadata = await call("ModelMetadata", { name: "double" });
  const report = {
    live: (await call("ServerLive", {})).live,
    ready: (await call("ModelReady", { name: "double" })).ready,
    inputs: metadata.inputs,
    index: (await call("RepositoryIndex", {})).models.map((model) => `${model.name} ${model.state}`).sort(),
    config: (await call("ModelConfig", { name: "double" })).config.max_batch_size,
    statistics: (await call("ModelStatistics", { name: "double" })).model_stats.length,
    id: answer.id,
    infer: numbers(answer.raw_output_contents[0]),
    typed: numbers(typed.raw_output_contents[0]),
    many: many.every((got, n) => numbers(got.raw_output_contents[0])[0] === 2 * n),
    large: numbers(large.raw_output_contents[0]).every((value, n) => value === 2 * wide[n]),
    unknown: await call("ModelInfer", request("nope", ones)),
    invalid: (await call("ModelInfer", request("double", [1, 2, 3, 4, 5, 6, 7, 8], { inputs: [] }))).code,
    deadline: (await call("ModelInfer", request("patient", ones), { deadline: Date.now() + 200 })).code,
    cancelled: await cancelled(),
    stream: await stream([request("double", ones), request("nope", ones), request("double", ones)]),
  };
  console.log(JSON.stringify(report));
  client.close();
}

main();
