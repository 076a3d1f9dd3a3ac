// Command judges tells what GitOps tools make of objects: kstatus, from the library that kpt and others use; Flux, with its
// own evaluator of CEL health checks; Argo CD, whose health scripts run in gopher-lua with few libraries.
//
//	judges health HEALTH.LUA FLUX.YAML < OBJECTS
//	judges monitoring < OBJECTS
//	judges policies KUBECONFIG NODE SERVICE-NETWORK
//
// Objects are JSON, one after the other; so are the judgements, in the same order. The second form reads PodMonitors and
// PrometheusRules into the types of the Prometheus operator, and refuses a field that they do not have. The third judges
// packets: kube-router's controller turns the NetworkPolicies of a cluster into firewall rules of this node, and stays.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/cloudnativelabs/kube-router/v2/pkg/controllers/netpol"
	"github.com/cloudnativelabs/kube-router/v2/pkg/healthcheck"
	"github.com/cloudnativelabs/kube-router/v2/pkg/options"
	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	lua "github.com/yuin/gopher-lua"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
	"sigs.k8s.io/yaml"
)

// luaTimeout is what Argo CD gives a script.
const luaTimeout = time.Second

type judgement struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

type judgements struct {
	Kstatus judgement `json:"kstatus"`
	Flux    judgement `json:"flux"`
	Argo    judgement `json:"argo"`
}

func main() {
	var err error
	switch {
	case len(os.Args) == 4 && os.Args[1] == "health":
		err = judgeAll(os.Args[2], os.Args[3])
	case len(os.Args) == 2 && os.Args[1] == "monitoring":
		err = readStrictly()
	case len(os.Args) == 5 && os.Args[1] == "policies":
		err = enforce(os.Args[2], os.Args[3], os.Args[4])
	default:
		fmt.Fprintln(os.Stderr, "judges health HEALTH.LUA FLUX.YAML, or judges monitoring; objects on standard input")
		fmt.Fprintln(os.Stderr, "judges policies KUBECONFIG NODE SERVICE-NETWORK")
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "judges:", err)
		os.Exit(1)
	}
}

func judgeAll(luaFile, fluxFile string) error {
	script, err := os.ReadFile(luaFile)
	if err != nil {
		return err
	}
	flux, err := fluxEvaluator(fluxFile)
	if err != nil {
		return err
	}
	objects, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var text json.RawMessage
		if err := objects.Decode(&text); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		// Its own decoder keeps whole numbers whole.
		object := &unstructured.Unstructured{}
		if err := object.UnmarshalJSON(text); err != nil {
			return err
		}
		told, err := judge(object, flux, string(script))
		if err != nil {
			return fmt.Errorf("%s: %w", object.GetName(), err)
		}
		if err := out.Encode(told); err != nil {
			return err
		}
	}
}

func judge(object *unstructured.Unstructured, flux *cel.StatusEvaluator, script string) (*judgements, error) {
	told := &judgements{}
	generic, err := status.Compute(object)
	if err != nil {
		return nil, fmt.Errorf("kstatus: %w", err)
	}
	told.Kstatus = judgement{Status: generic.Status.String(), Message: generic.Message}
	checked, err := flux.Evaluate(context.Background(), object)
	if err != nil {
		return nil, fmt.Errorf("flux: %w", err)
	}
	told.Flux = judgement{Status: checked.Status.String(), Message: checked.Message}
	if told.Argo, err = argo(object, script); err != nil {
		return nil, fmt.Errorf("argo: %w", err)
	}
	return told, nil
}

// readStrictly reads every object into the type of its kind.
func readStrictly() error {
	objects := json.NewDecoder(os.Stdin)
	for {
		var text json.RawMessage
		if err := objects.Decode(&text); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		var head metav1.TypeMeta
		if err := json.Unmarshal(text, &head); err != nil {
			return err
		}
		kinds := map[string]any{"PodMonitor": &monitoring.PodMonitor{}, "PrometheusRule": &monitoring.PrometheusRule{}, "ServiceMonitor": &monitoring.ServiceMonitor{}}
		object, known := kinds[head.Kind]
		if !known || head.APIVersion != "monitoring.coreos.com/v1" {
			return fmt.Errorf("%s %s is no kind of the Prometheus operator", head.APIVersion, head.Kind)
		}
		if err := yaml.UnmarshalStrict(text, object); err != nil {
			return fmt.Errorf("%s: %w", head.Kind, err)
		}
		fmt.Println(head.Kind)
	}
}

// fluxEvaluator takes the expressions of the first health check in a Flux Kustomization.
func fluxEvaluator(file string) (*cel.StatusEvaluator, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var manifest struct {
		Spec struct {
			HealthCheckExprs []kustomize.CustomHealthCheck `json:"healthCheckExprs"`
		} `json:"spec"`
	}
	if err := yaml.Unmarshal(text, &manifest); err != nil {
		return nil, err
	}
	if len(manifest.Spec.HealthCheckExprs) != 1 {
		return nil, fmt.Errorf("%s: want one health check, have %d", file, len(manifest.Spec.HealthCheckExprs))
	}
	return cel.NewStatusEvaluator(&manifest.Spec.HealthCheckExprs[0].HealthCheckExpressions)
}

// argo runs the script as Argo CD does: `obj` is the object, the answer a table with status and message.
func argo(object *unstructured.Unstructured, script string) (judgement, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable,
	} {
		if err := state.CallByParam(lua.P{Fn: state.NewFunction(open), Protect: true}, lua.LString(name)); err != nil {
			return judgement{}, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), luaTimeout)
	defer cancel()
	state.SetContext(ctx)
	state.SetGlobal("obj", toLua(state, object.Object))
	if err := state.DoString(script); err != nil {
		return judgement{}, err
	}
	answer, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		return judgement{}, fmt.Errorf("the script returned a %s", state.Get(-1).Type())
	}
	told := judgement{Status: lua.LVAsString(answer.RawGetString("status")), Message: lua.LVAsString(answer.RawGetString("message"))}
	switch told.Status {
	case "Healthy", "Progressing", "Degraded", "Suspended", "Missing", "Unknown":
		return told, nil
	}
	return judgement{}, fmt.Errorf("Argo CD knows no status %q", told.Status)
}

func toLua(state *lua.LState, value any) lua.LValue {
	switch value := value.(type) {
	case map[string]any:
		table := state.CreateTable(0, len(value))
		for key, item := range value {
			table.RawSetString(key, toLua(state, item))
		}
		return table
	case []any:
		table := state.CreateTable(len(value), 0)
		for _, item := range value {
			table.Append(toLua(state, item))
		}
		return table
	case string:
		return lua.LString(value)
	case bool:
		return lua.LBool(value)
	case float64:
		return lua.LNumber(value)
	case int64:
		return lua.LNumber(value)
	}
	return lua.LNil
}

// enforce runs the part of kube-router that reads policies, and none of its routing or proxying.
func enforce(kubeconfig, node, services string) error {
	client, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	cluster, err := kubernetes.NewForConfig(client)
	if err != nil {
		return err
	}
	config := options.NewKubeRouterConfig()
	config.HostnameOverride, config.ClusterIPCIDRs = node, []string{services}
	config.EnableIPv4, config.EnableIPv6 = true, false
	tables, sets, err := netpol.NewIPTablesHandlers(config)
	if err != nil {
		return err
	}
	shared := informers.NewSharedInformerFactory(cluster, 0)
	pods, namespaces := shared.Core().V1().Pods().Informer(), shared.Core().V1().Namespaces().Informer()
	policies := shared.Networking().V1().NetworkPolicies().Informer()
	var lock sync.Mutex
	controller, err := netpol.NewNetworkPolicyController(cluster, config, pods, policies, namespaces, &lock, tables, sets)
	if err != nil {
		return err
	}
	for informer, handler := range map[cache.SharedIndexInformer]cache.ResourceEventHandler{
		pods: controller.PodEventHandler, namespaces: controller.NamespaceEventHandler, policies: controller.NetworkPolicyEventHandler,
	} {
		if _, err := informer.AddEventHandler(handler); err != nil {
			return err
		}
	}
	shared.Start(nil)
	shared.WaitForCacheSync(nil)
	// Nobody listens for signs of life here.
	beats := make(chan *healthcheck.ControllerHeartbeat)
	go func() {
		for range beats {
		}
	}()
	var running sync.WaitGroup
	running.Add(1)
	controller.Run(beats, nil, &running)
	return nil
}
