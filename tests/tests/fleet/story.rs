//! In: a fleet and an operator to measure in it. Out: its figures: a thousand objects at once, rest, a restart, a trickle.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use plimsoll_tests::cluster::{AuditEvent, Daemon, Fleet};
use plimsoll_tests::facts::small_model;
use plimsoll_tests::http::Connection;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::kubelets;
use crate::subjects::{self, Subject};
use crate::usage::{Meter, resident, rounded};
use crate::watch::{Seen, Spread, Watching};

/// Clients that create at once, as other operators were measured with.
pub const CLIENTS: usize = 8;
/// Created in the second of a trickle.
pub const A_SECOND: u32 = 10;
/// Nothing written for so long is quiet.
const QUIET: Duration = Duration::from_secs(15);
const GPUS: u32 = 32;
/// Longest wait for anything; a thousand Deployments take the controllers some five minutes.
const PATIENCE: Duration = Duration::from_secs(1800);
const STOP_MAX: Duration = Duration::from_secs(20);

pub struct Size {
    pub objects: usize,
    pub rest_seconds: u64,
    pub trickled: usize,
    pub nodes: usize,
    pub namespaces: usize,
}

/// The whole story; with kwok, or with kubelets that are played here.
pub fn measure(fleet: &mut Fleet, subject: &Subject, size: &Size, kwok: bool) -> Value {
    fleet.add_nodes(size.nodes, GPUS, &gpu_labels()).unwrap();
    (subject.prepare)(fleet).unwrap();
    let is_ours = subject.name == subjects::PLIMSOLL.name;
    if is_ours {
        on_client(fleet, async |client| know_the_model(fleet, &client, size).await).unwrap();
    }
    if kwok {
        fleet.start_kwok().unwrap();
    }
    on_client(fleet, async |client| {
        if !kwok {
            kubelets::play(&client);
        }
        Run::begin(fleet, client, subject, size)?.whole().await
    })
    .unwrap()
}

/// Runs `work` inside the fleet's network with an administrator's client.
fn on_client<T: Send>(
    fleet: &Fleet,
    work: impl AsyncFnOnce(Client) -> Result<T> + Send,
) -> Result<T> {
    let kubeconfig = fleet.kubeconfig();
    fleet.inside(|| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(async { work(client(kubeconfig).await?).await })
    })
}

async fn client(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let options = KubeConfigOptions::default();
    Ok(Client::try_from(Config::from_custom_kubeconfig(kubeconfig, &options).await?)?)
}

fn gpu_labels() -> Value {
    json!({"nvidia.com/gpu.product": "NVIDIA-H200", "nvidia.com/gpu.memory": "143771"})
}

fn namespace(index: usize) -> String {
    format!("fleet-{index}")
}

/// Lets an operator learn the model of one object, as it does in a cluster, and lays what it wrote down into every
/// namespace: what nobody owns is there before the first object.
async fn know_the_model(fleet: &Fleet, client: &Client, size: &Size) -> Result<()> {
    let subject = &subjects::PLIMSOLL;
    let mut operator = (subject.start)(fleet)?;
    fleet.kubectl().run(&["create", "namespace", "first"])?;
    create(client, subject, "first", "first").await?;
    kubelets::finish_inspect(client, "first", &small_model()).await;
    let first: Api<ConfigMap> = Api::namespaced(client.clone(), "first");
    let began = Instant::now();
    let facts = loop {
        let found = first.list(&ListParams::default().labels("plimsoll.dev/model")).await?;
        if let Some(facts) = found.items.into_iter().next() {
            break facts;
        }
        ensure!(began.elapsed() < Duration::from_secs(60), "no facts were written");
        sleep(Duration::from_millis(100)).await;
    };
    operator.terminate(STOP_MAX)?;
    fleet.kubectl().run(&["delete", "namespace", "first", "--wait=false"])?;
    for index in 0..size.namespaces {
        let namespace = namespace(index);
        fleet.kubectl().run(&["create", "namespace", &namespace])?;
        let mut known = facts.clone();
        known.metadata = kube::api::ObjectMeta {
            name: facts.metadata.name.clone(),
            labels: facts.metadata.labels.clone(),
            ..Default::default()
        };
        let facts: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
        facts.create(&PostParams::default(), &known).await?;
    }
    Ok(())
}

async fn create(client: &Client, subject: &Subject, namespace: &str, name: &str) -> Result<()> {
    let resource = subject.object.resource();
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource);
    let mut object = DynamicObject::new(name, &resource);
    object.data = json!({"spec": (subject.spec)()});
    api.create(&PostParams::default(), &object).await?;
    Ok(())
}

/// An operator at work in a fleet, and what is seen of it.
struct Run<'a> {
    fleet: &'a Fleet,
    client: Client,
    subject: &'a Subject,
    size: &'a Size,
    operator: Daemon,
    watching: Watching,
    /// How much of the audit log was read.
    read: u64,
}

impl<'a> Run<'a> {
    fn begin(
        fleet: &'a Fleet,
        client: Client,
        subject: &'a Subject,
        size: &'a Size,
    ) -> Result<Run<'a>> {
        if subject.name != subjects::PLIMSOLL.name {
            for index in 0..size.namespaces {
                fleet.kubectl().run(&["create", "namespace", &namespace(index)])?;
            }
        }
        let operator = (subject.start)(fleet)?;
        let watching = Watching::start(&client, subject);
        Ok(Run { fleet, client, subject, size, operator, watching, read: 0 })
    }

    async fn whole(mut self) -> Result<Value> {
        sleep(Duration::from_secs(5)).await;
        self.requests()?;
        let (empty, _) = resident(self.operator.id());
        eprintln!("{}: begins", self.subject.name);
        let creation = self.creation().await?;
        eprintln!("{}: {creation:#}", self.subject.name);
        let rest = self.rest().await?;
        eprintln!("{}: {rest:#}", self.subject.name);
        let (steady, most) = resident(self.operator.id());
        let restart = self.restart().await?;
        eprintln!("{}: {restart:#}", self.subject.name);
        let (again, most_again) = resident(self.operator.id());
        let trickle = self.trickle().await?;
        eprintln!("{}: {trickle:#}", self.subject.name);
        let memory = json!({"empty": empty, "steady": steady, "max": most, "afterRestart": again,
            "maxAfterRestart": most_again});
        Ok(
            json!({"creation": creation, "rest": rest, "restart": restart, "trickle": trickle, "residentMB": memory}),
        )
    }

    fn meter(&self) -> Meter {
        let [api_server, etcd] = self.fleet.plane_processes();
        Meter::start(&[("operator", self.operator.id()), ("apiServer", api_server), ("etcd", etcd)])
    }

    /// What the operator asked for since the last call, Leases apart.
    fn requests(&mut self) -> Result<Requests> {
        let (events, read) = self.fleet.requests_since(self.subject.user, self.read)?;
        self.read = read;
        Ok(Requests::of(events))
    }

    /// All at once.
    async fn creation(&mut self) -> Result<Value> {
        let Size { objects, namespaces, .. } = *self.size;
        let meter = self.meter();
        let began = Timestamp::now();
        let created = futures::stream::iter(0..objects)
            .map(|index| {
                let (client, subject) = (&self.client, self.subject);
                async move {
                    create(client, subject, &namespace(index % namespaces), &format!("o-{index}"))
                        .await
                }
            })
            .buffer_unordered(CLIENTS);
        created.collect::<Vec<_>>().await.into_iter().collect::<Result<Vec<()>>>()?;
        let created_in = meter.elapsed();
        let all_children = self.until(&meter, "o-", |(children, ..)| children == objects).await?;
        let busy_until_children = meter.processor_seconds();
        let all_pods = self.until(&meter, "o-", |(_, pods, _)| pods == objects).await?;
        let all_ready = self.until(&meter, "o-", |(.., ready)| ready == objects).await?;
        let mut requests = self.requests()?;
        let until_ready = requests.writes.len();
        self.quiet(&mut requests).await?;
        let seen = self.watching.of("o-");
        let ready = seen.iter().filter_map(|seen| Some(seen.ready? - seen.object?));
        let after_pod = seen
            .iter()
            .filter_map(|seen| Some(seen.ready?.saturating_duration_since(seen.pod_ready?)));
        let mut figures = meter.stop();
        figures["createdIn"] = rounded(created_in.as_secs_f64()).into();
        figures["allChildrenAfter"] = rounded(all_children).into();
        figures["processorSecondsUntilThen"] = busy_until_children;
        figures["allPodsReadyAfter"] = rounded(all_pods).into();
        figures["allReadyAfter"] = rounded(all_ready).into();
        figures["quietAfter"] = requests.last_write_after(began).into();
        figures["objectToChild"] = self.by_kind(&seen);
        figures["objectToLastChild"] = last_child(&seen).json();
        figures["objectToReady"] = Spread::of(ready).json();
        figures["podReadyToReady"] = Spread::of(after_pod).json();
        figures["writesUntilReadyPerObject"] = rounded(until_ready as f64 / objects as f64).into();
        figures["requests"] = requests.json(objects);
        Ok(figures)
    }

    fn by_kind(&self, seen: &[Seen]) -> Value {
        let mut kinds = json!({});
        for child in self.subject.children {
            let times = seen.iter().filter_map(|seen| {
                Some(seen.children.get(child.kind)?.saturating_duration_since(seen.object?))
            });
            kinds[child.kind] = Spread::of(times).json();
        }
        kinds
    }

    /// Seconds until the counts of what is seen are so.
    async fn until(
        &self,
        meter: &Meter,
        prefix: &str,
        done: impl Fn((usize, usize, usize)) -> bool,
    ) -> Result<f64> {
        loop {
            let counts = self.watching.counts(prefix);
            if done(counts) {
                return Ok(meter.elapsed().as_secs_f64());
            }
            ensure!(
                meter.elapsed() < PATIENCE,
                "children, ready pods and Ready objects: {counts:?}"
            );
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until nothing was written for a while; adds what came meanwhile.
    async fn quiet(&mut self, requests: &mut Requests) -> Result<()> {
        let began = Instant::now();
        let mut last = Instant::now();
        while last.elapsed() < QUIET {
            ensure!(began.elapsed() < PATIENCE, "it does not fall quiet");
            sleep(Duration::from_secs(3)).await;
            let more = self.requests()?;
            if !more.writes.is_empty() {
                last = Instant::now();
            }
            requests.add(more);
        }
        Ok(())
    }

    async fn rest(&mut self) -> Result<Value> {
        self.requests()?;
        let meter = self.meter();
        sleep(Duration::from_secs(self.size.rest_seconds)).await;
        let mut figures = meter.stop();
        let seconds = figures["seconds"].as_f64().context("seconds")?;
        let busy = figures["processorSeconds"]["operator"].as_f64().context("seconds")?;
        figures["operatorPercentOfACore"] = ((busy / seconds * 1e4).round() / 100.0).into();
        figures["requests"] = self.requests()?.json(1);
        Ok(figures)
    }

    /// Asked to end, and started anew.
    async fn restart(&mut self) -> Result<Value> {
        self.operator.terminate(STOP_MAX)?;
        self.requests()?;
        let began = Timestamp::now();
        self.operator = (self.subject.start)(self.fleet)?;
        let meter = self.meter();
        let mut requests = Requests::default();
        let looked_at = match self.subject.name == subjects::PLIMSOLL.name {
            true => self.every_object_is_looked_at(&meter).await?,
            false => self.every_object_is_written(&meter, &mut requests).await?,
        };
        self.quiet(&mut requests).await?;
        let mut figures = meter.stop();
        figures["everyObjectLookedAtAfter"] = rounded(looked_at).into();
        figures["quietAfter"] = requests.last_write_after(began).into();
        figures["requests"] = requests.json(self.size.objects);
        Ok(figures)
    }

    /// By the operator's own count of reconciles.
    async fn every_object_is_looked_at(&self, meter: &Meter) -> Result<f64> {
        let address = SocketAddr::new(self.fleet.address(), 8080);
        loop {
            sleep(Duration::from_millis(100)).await;
            let answer = Connection::open(address).and_then(|mut open| open.get("/metrics"));
            let text = answer.map(|answer| answer.text()).unwrap_or_default();
            let counted =
                text.lines().filter(|line| line.starts_with("plimsoll_operator_reconcile_total{"));
            let counts = counted.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            if counts.sum::<f64>() >= self.size.objects as f64 {
                return Ok(meter.elapsed().as_secs_f64());
            }
            ensure!(meter.elapsed() < PATIENCE, "not every object is looked at: {text}");
        }
    }

    /// Of an operator that writes for every object it looks at.
    async fn every_object_is_written(
        &mut self,
        meter: &Meter,
        requests: &mut Requests,
    ) -> Result<f64> {
        loop {
            sleep(Duration::from_millis(250)).await;
            requests.add(self.requests()?);
            let names = requests.writes.iter().map(|write| (&write.namespace, &write.name));
            if names.collect::<HashSet<_>>().len() >= self.size.objects {
                return Ok(meter.elapsed().as_secs_f64());
            }
            if meter.elapsed() > Duration::from_secs(120) {
                return Ok(f64::NAN);
            }
        }
    }

    /// One by one, beside all those that stand.
    async fn trickle(&mut self) -> Result<Value> {
        let Size { trickled, namespaces, .. } = *self.size;
        self.requests()?;
        let meter = self.meter();
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / A_SECOND);
        for index in 0..trickled {
            ticks.tick().await;
            let (client, subject) = (self.client.clone(), self.subject);
            let (namespace, name) = (namespace(index % namespaces), format!("t-{index}"));
            create(&client, subject, &namespace, &name).await?;
        }
        self.until(&meter, "t-", |(children, ..)| children == trickled).await?;
        let seen = self.watching.of("t-");
        let mut figures = meter.stop();
        let mut requests = Requests::default();
        self.until(&self.meter(), "t-", |(.., ready)| ready == trickled).await?;
        self.quiet(&mut requests).await?;
        figures["requests"] = requests.json(trickled);
        figures["objects"] = trickled.into();
        figures["aSecond"] = A_SECOND.into();
        figures["objectToChild"] = self.by_kind(&seen);
        figures["objectToLastChild"] = last_child(&seen).json();
        Ok(figures)
    }
}

/// From the object to the last of its children.
fn last_child(seen: &[Seen]) -> Spread {
    let last = seen.iter().filter_map(|seen| {
        Some(seen.children.values().max()?.saturating_duration_since(seen.object?))
    });
    Spread::of(last)
}

/// Requests of an operator.
#[derive(Default)]
struct Requests {
    writes: Vec<AuditEvent>,
    reads: Vec<AuditEvent>,
    watches: usize,
    leases: usize,
}

impl Requests {
    fn of(events: Vec<AuditEvent>) -> Requests {
        let mut requests = Requests::default();
        for event in events {
            match event.verb.as_str() {
                _ if event.resource == "leases" => requests.leases += 1,
                "watch" => requests.watches += 1,
                _ if event.is_write() => requests.writes.push(event),
                _ => requests.reads.push(event),
            }
        }
        requests
    }

    fn add(&mut self, more: Requests) {
        self.writes.extend(more.writes);
        self.reads.extend(more.reads);
        self.watches += more.watches;
        self.leases += more.leases;
    }

    /// Seconds from `began` to the last write; none where nothing was written.
    fn last_write_after(&self, began: Timestamp) -> Option<f64> {
        let last = self.writes.iter().map(|write| write.at.as_str()).max()?;
        let last: Timestamp = last.parse().unwrap();
        Some(rounded(last.duration_since(began).as_secs_f64()))
    }

    fn json(&self, objects: usize) -> Value {
        let conflicts = self.writes.iter().filter(|write| write.code == 409).count();
        let share = |count: usize| rounded(count as f64 / objects as f64);
        json!({
            "writes": self.writes.len(), "reads": self.reads.len(), "watches": self.watches,
            "leases": self.leases, "conflicts": conflicts,
            "writesPerObject": share(self.writes.len()), "readsPerObject": share(self.reads.len()),
            "writesOf": counted(&self.writes), "readsOf": counted(&self.reads),
        })
    }
}

/// By verb and resource, the most frequent first in mind and in the order of words on paper.
fn counted(events: &[AuditEvent]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for event in events {
        let resource = match event.subresource.as_str() {
            "" => event.resource.clone(),
            subresource => format!("{}/{subresource}", event.resource),
        };
        *counts.entry(format!("{} {resource}", event.verb)).or_insert(0) += 1;
    }
    counts
}
