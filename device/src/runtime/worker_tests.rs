//! Work that is spread over the stations of several nodes, on any host: only the numbers of nodes count.

use super::*;
use crate::runtime::topology::Node;
use std::time::Duration;

/// A pool of one worker on each of two nodes, none of them bound to processors.
fn two_nodes() -> (Arc<Pool>, Vec<JoinHandle<()>>) {
    let node = |id| Node {
        id: NodeId(id),
        cpus: None,
        processors: 1,
    };
    let host = Host::of_nodes(vec![node(0), node(1)]);
    let pool = Arc::new(Pool::new(host, &[1, 1]).unwrap());
    let workers = (0..2)
        .map(|station| spawn(&pool, station, 0).unwrap())
        .collect();
    (pool, workers)
}

/// A device whose turn spreads work over the nodes, the first of which is `first`.
#[derive(Debug)]
struct Spreads {
    pool: Arc<Pool>,
    first: u32,
    done: Sender<usize>,
}

impl Servable for Spreads {
    fn kicked(&self, _queue: u16) -> bool {
        true
    }

    fn serve(&self, _scratch: &mut Scratch, _patience: &Patience<'_>) -> bool {
        let nodes = [self.first, 1 - self.first];
        let jobs = nodes.map(|node| (Some(NodeId(node)), move || node));
        self.done
            .send(self.pool.scatter(jobs.into_iter()).len())
            .unwrap();
        false
    }
}

#[test]
fn a_worker_waits_for_no_part_that_only_itself_could_run() {
    let (pool, workers) = two_nodes();
    let (done, results) = unbounded();
    for round in 0..200 {
        for station in 0..2 {
            let device = Spreads {
                pool: Arc::clone(&pool),
                first: (round + u32::from(station == 0)) % 2,
                done: done.clone(),
            };
            pool.submit(station, Arc::new(device));
        }
        for _ in 0..2 {
            let parts = results.recv_timeout(Duration::from_secs(10));
            assert_eq!(parts, Ok(2), "round {round}");
        }
    }
    pool.stop();
    for worker in workers {
        worker.join().unwrap();
    }
}
