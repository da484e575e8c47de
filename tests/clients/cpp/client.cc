// A C++ client with stubs made by `protoc` from Shoal's .proto files: prints one line for each thing it saw.
//
//     client HOST:PORT      (models: `double`, x [N,4] FP32 -> y = 2x; `patient`, which waits for four rows)
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "shoal/inference/v2/inference.grpc.pb.h"

using inference::GRPCInferenceService;
using inference::ModelInferRequest;
using inference::ModelInferResponse;

static ModelInferRequest Request(const std::string& model, int rows, float start) {
  ModelInferRequest request;
  request.set_model_name(model);
  request.set_id("r" + std::to_string(rows));
  auto* x = request.add_inputs();
  x->set_name("x");
  x->set_datatype("FP32");
  x->add_shape(rows);
  x->add_shape(4);
  std::vector<float> values(rows * 4);
  for (size_t n = 0; n < values.size(); ++n) values[n] = start + n;
  request.add_raw_input_contents(values.data(), values.size() * sizeof(float));
  return request;
}

static std::vector<float> Values(const ModelInferResponse& response) {
  const std::string& raw = response.raw_output_contents(0);
  std::vector<float> values(raw.size() / sizeof(float));
  std::memcpy(values.data(), raw.data(), raw.size());
  return values;
}

static void Print(const char* what, const ModelInferResponse& response) {
  std::printf("%s %s", what, response.id().c_str());
  for (float value : Values(response)) std::printf(" %g", value);
  std::printf("\n");
}

static void Print(const char* what, const grpc::Status& status) {
  std::printf("%s %d %s\n", what, status.error_code(), status.error_message().c_str());
}

int main(int argc, char** argv) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  auto channel = grpc::CreateCustomChannel(argv[argc - 1], grpc::InsecureChannelCredentials(), arguments);
  auto stub = GRPCInferenceService::NewStub(channel);

  inference::ModelMetadataResponse metadata;
  {
    grpc::ClientContext context;
    inference::ModelMetadataRequest asked;
    asked.set_name("double");
    Print("metadata", stub->ModelMetadata(&context, asked, &metadata));
    std::printf("input %s %s\n", metadata.inputs(0).name().c_str(), metadata.inputs(0).datatype().c_str());
  }
  {
    grpc::ClientContext context;
    ModelInferResponse response;
    context.AddMetadata("x-shoal-tenant", "cpp");
    Print("status", stub->ModelInfer(&context, Request("double", 2, 1), &response));
    Print("infer", response);
  }
  {
    // 8 MB each way, beyond gRPC's default limit.
    grpc::ClientContext context;
    context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
    ModelInferResponse response;
    grpc::Status status = stub->ModelInfer(&context, Request("wide", 500000, 0), &response);
    Print("large", status);
    std::printf("last %g\n", status.ok() ? Values(response).back() : -1);
  }
  {
    grpc::ClientContext context;
    ModelInferResponse response;
    Print("unknown", stub->ModelInfer(&context, Request("nope", 1, 1), &response));
  }
  {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
    ModelInferResponse response;
    Print("deadline", stub->ModelInfer(&context, Request("patient", 1, 1), &response));
  }
  {
    grpc::ClientContext context;
    auto stream = stub->ModelStreamInfer(&context);
    for (const char* model : {"double", "nope", "double"}) stream->Write(Request(model, 1, 1));
    stream->WritesDone();
    inference::ModelStreamInferResponse answer;
    while (stream->Read(&answer)) {
      if (answer.error_message().empty()) {
        Print("streamed", answer.infer_response());
      } else {
        std::printf("refused %s\n", answer.error_message().c_str());
      }
    }
    Print("stream", stream->Finish());
  }
  {
    // Many at once, without waiting: each answer is that of its own request.
    constexpr int kCalls = 200;
    struct Call {
      grpc::ClientContext context;
      ModelInferResponse response;
      grpc::Status status;
      std::unique_ptr<grpc::ClientAsyncResponseReader<ModelInferResponse>> reader;
    };
    std::vector<std::unique_ptr<Call>> calls;
    grpc::CompletionQueue queue;
    for (long n = 0; n < kCalls; ++n) {
      calls.push_back(std::make_unique<Call>());
      Call& call = *calls.back();
      call.reader = stub->AsyncModelInfer(&call.context, Request("double", 1, n), &queue);
      call.reader->Finish(&call.response, &call.status, reinterpret_cast<void*>(n + 1));
    }
    int right = 0;
    for (int n = 0; n < kCalls; ++n) {
      void* tag;
      bool ok;
      queue.Next(&tag, &ok);
      Call& call = *calls[reinterpret_cast<long>(tag) - 1];
      float expected = 2.0f * (reinterpret_cast<long>(tag) - 1);
      right += call.status.ok() && Values(call.response)[0] == expected;
    }
    std::printf("async %d of %d\n", right, kCalls);
  }
  return 0;
}
