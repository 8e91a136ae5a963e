// Makes kubelet's requests to a container runtime with kubelet's own library, by version 1 of the CRI. Requests are JSON with the CRI's names.
//
//	cri ENDPOINT run POD.json                          makes a sandbox, prints its id
//	cri ENDPOINT start ID POD.json CONTAINER.json      makes a container in it and starts that, prints its id
//	cri ENDPOINT update ID REQUEST.json                UpdatePodSandboxResources
//	cri ENDPOINT status ID                             prints the runtime's status of the sandbox
//	cri ENDPOINT stop ID | remove ID                   stops or removes the sandbox
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
)

// How long to wait for the runtime to start, and for all of its answers together. User Mode Linux is slow.
const patience = 2 * time.Minute

func main() {
	if err := ask(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cri:", err)
		os.Exit(1)
	}
}

func ask(args []string) error {
	if len(args) < 3 {
		return errors.New("called as: cri ENDPOINT run|start|update|status|stop|remove ARGUMENT..")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	runtime, err := remote.NewRemoteRuntimeService(ctx, args[0], patience, noop.NewTracerProvider(), false)
	if err != nil {
		return err
	}
	verb, args := args[1], args[2:]
	switch {
	case verb == "run" && len(args) == 1:
		return run(ctx, runtime, args[0])
	case verb == "start" && len(args) == 3:
		return start(ctx, runtime, args[0], args[1], args[2])
	case verb == "update" && len(args) == 2:
		return update(ctx, runtime, args[0], args[1])
	case verb == "status" && len(args) == 1:
		return status(ctx, runtime, args[0])
	case verb == "stop" && len(args) == 1:
		return runtime.StopPodSandbox(ctx, args[0])
	case verb == "remove" && len(args) == 1:
		return runtime.RemovePodSandbox(ctx, args[0])
	}
	return fmt.Errorf("nothing is called %s with %d arguments", verb, len(args))
}

func run(ctx context.Context, runtime cri.RuntimeService, path string) error {
	pod := &v1.PodSandboxConfig{}
	if err := read(path, pod); err != nil {
		return err
	}
	id, err := runtime.RunPodSandbox(ctx, pod, "")
	if err != nil {
		return err
	}
	fmt.Println(id)
	return nil
}

func start(ctx context.Context, runtime cri.RuntimeService, sandbox, podPath, path string) error {
	pod, container := &v1.PodSandboxConfig{}, &v1.ContainerConfig{}
	if err := errors.Join(read(podPath, pod), read(path, container)); err != nil {
		return err
	}
	id, err := runtime.CreateContainer(ctx, sandbox, container, pod)
	if err != nil {
		return err
	}
	fmt.Println(id)
	return runtime.StartContainer(ctx, id)
}

func update(ctx context.Context, runtime cri.RuntimeService, sandbox, path string) error {
	request := &v1.UpdatePodSandboxResourcesRequest{}
	if err := read(path, request); err != nil {
		return err
	}
	request.PodSandboxId = sandbox
	_, err := runtime.UpdatePodSandboxResources(ctx, request)
	return err
}

func status(ctx context.Context, runtime cri.RuntimeService, sandbox string) error {
	response, err := runtime.PodSandboxStatus(ctx, sandbox, false)
	if err != nil {
		return err
	}
	fmt.Println(protojson.Format(response.GetStatus()))
	return nil
}

// read refuses fields that this version of the CRI does not have.
func read(path string, message proto.Message) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := protojson.Unmarshal(text, message); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}
