// Command addons is what a test cluster wants beside Kubernetes itself: helm, to install the chart
// as users do, and CoreDNS with the few plugins that pods need to resolve Service names. The first
// argument names the part; both share the same Kubernetes client, hence one file.
package main

import (
	"fmt"
	"os"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/ready"
	helm "helm.sh/helm/v4/pkg/cmd"
)

func main() {
	if len(os.Args) < 2 {
		refuse()
	}
	os.Args = os.Args[1:]
	switch os.Args[0] {
	case "helm":
		runHelm()
	case "coredns":
		dnsserver.Directives = []string{"errors", "health", "ready", "kubernetes"}
		coremain.Run()
	default:
		refuse()
	}
}

func runHelm() {
	command, err := helm.NewRootCmd(os.Stdout, os.Args[1:], helm.SetupLogging)
	if err == nil {
		err = command.Execute()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "helm:", err)
		os.Exit(1)
	}
}

func refuse() {
	fmt.Fprintln(os.Stderr, "addons: name a part; there are helm, coredns")
	os.Exit(2)
}
