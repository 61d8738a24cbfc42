//! Random operations on every kind of image, against a flat model.

use formats::conformance::{Point, Suite, differential, seeds};

use super::directory;

/// `QCOW2_SEED=7` runs one seed, `QCOW2_SEEDS=2000` or `QCOW2_SEEDS=2000..4000` others than the
/// usual ones.
#[test]
fn differential_runs_agree_with_a_flat_model_and_with_qemu() {
    let directory = directory();
    let seeds = seeds("QCOW2_SEED", "QCOW2_SEEDS", 200).unwrap();
    let suite = Suite {
        format: formats::find("qcow2").expect("the format `qcow2` is registered"),
        directory: directory.path(),
        admit: &Some,
        again: &|seed| format!("QCOW2_SEED={seed} cargo test -p formats --test qcow2 differential"),
    };
    match differential(&suite, &seeds) {
        Err(failures) => {
            let kept = directory.keep();
            panic!("{failures}\nthe images are in {}", kept.display());
        }
        Ok(met) if seeds.len() >= 200 => {
            let missing: Vec<_> = Point::matrix()
                .into_iter()
                .filter(|value| !met.contains(value))
                .collect();
            assert!(missing.is_empty(), "not tested: {missing:?}");
        }
        Ok(_) => {}
    }
}
