"""The texts that LlamaBoard shows for OGPSA, in its languages and in the form of its own tables."""

from typing import Any


LOCALES = {
    "ogpsa_tab": {
        "en": {"label": "OGPSA configurations"},
        "ru": {"label": "Конфигурации OGPSA"},
        "zh": {"label": "OGPSA 参数设置"},
        "ko": {"label": "OGPSA 구성"},
        "ja": {"label": "OGPSA 設定"},
    },
    "ogpsa_dataset": {
        "en": {"label": "General sets", "info": "Datasets of the general abilities to preserve, one ability each."},
        "ru": {
            "label": "Общие наборы",
            "info": "Наборы данных по сохраняемым общим способностям, по одному на способность.",
        },
        "zh": {"label": "通用数据集", "info": "需要保留的通用能力的数据集，每种能力一个。"},
        "ko": {"label": "일반 데이터셋", "info": "보존할 일반 능력의 데이터셋. 능력마다 하나씩 선택합니다."},
        "ja": {"label": "一般データセット", "info": "保持したい一般能力のデータセット。能力ごとに一つ選びます。"},
    },
    "ogpsa_num_samples": {
        "en": {"label": "Samples per set", "info": "The first N samples of each general set are used."},
        "ru": {"label": "Примеров на набор", "info": "Из каждого общего набора берутся первые N примеров."},
        "zh": {"label": "每个数据集的样本数", "info": "使用每个通用数据集的前 N 个样本。"},
        "ko": {"label": "데이터셋당 샘플 수", "info": "각 일반 데이터셋의 처음 N개 샘플을 사용합니다."},
        "ja": {"label": "セットごとのサンプル数", "info": "各一般データセットの先頭 N 件のサンプルを使用します。"},
    },
    "ogpsa_update_interval": {
        "en": {"label": "Update interval", "info": "Number of steps between two refreshes of the OGPSA subspace."},
        "ru": {"label": "Интервал обновления", "info": "Количество шагов между обновлениями подпространства OGPSA."},
        "zh": {"label": "更新间隔", "info": "相邻两次 OGPSA 子空间更新之间的步数。"},
        "ko": {"label": "업데이트 간격", "info": "OGPSA 부분 공간을 업데이트할 간격의 스텝 수."},
        "ja": {"label": "更新間隔", "info": "OGPSA 部分空間の更新間のステップ数。"},
    },
    "ogpsa_rank": {
        "en": {"label": "OGPSA rank", "info": "The most directions kept in the subspace, 0 for the default."},
        "ru": {"label": "Ранг OGPSA", "info": "Наибольшее число направлений подпространства, 0 — по умолчанию."},
        "zh": {"label": "OGPSA 秩", "info": "子空间保留的最大方向数，0 表示默认值。"},
        "ko": {"label": "OGPSA 랭크", "info": "부분 공간에 유지할 최대 방향 수. 0이면 기본값입니다."},
        "ja": {"label": "OGPSA ランク", "info": "部分空間に保持する方向の最大数。0 は既定値です。"},
    },
    "ogpsa_scope": {
        "en": {
            "label": "Scope",
            "info": "One subspace per parameter tensor, one for all, or the input directions of each matrix.",
        },
        "ru": {
            "label": "Область",
            "info": "Подпространство для каждого тензора, одно общее или входные направления каждой матрицы.",
        },
        "zh": {"label": "作用范围", "info": "每个参数张量一个子空间、所有参数共用一个，或每个权重矩阵的输入方向。"},
        "ko": {
            "label": "적용 범위",
            "info": "파라미터 텐서마다 부분 공간, 전체가 하나를 공유, 또는 가중치 행렬마다 입력 방향.",
        },
        "ja": {"label": "適用範囲", "info": "テンソルごとの部分空間、全体で一つ、または重み行列ごとの入力方向。"},
    },
    "ogpsa_method": {
        "en": {"label": "Method", "info": "Remove the whole component, only what conflicts, or just monitor it."},
        "ru": {"label": "Метод", "info": "Удалять всю компоненту, только конфликтующую часть или лишь наблюдать."},
        "zh": {"label": "方法", "info": "移除全部分量、仅移除冲突部分，或仅监测。"},
        "ko": {"label": "방법", "info": "성분 전체를 제거하거나, 충돌하는 부분만 제거하거나, 관찰만 합니다."},
        "ja": {"label": "手法", "info": "成分をすべて除去、競合する部分だけを除去、または監視のみ。"},
    },
    "ogpsa_loss": {
        "en": {
            "label": "Reference loss",
            "info": "auto follows the sets: the stage's loss for rankings and tags, sft for plain records.",
        },
        "ru": {
            "label": "Опорная функция потерь",
            "info": "auto следует за наборами: потери этапа для ранжирования и меток, sft для обычных записей.",
        },
        "zh": {"label": "参考损失", "info": "auto 由数据集决定：偏好或带标签的数据用训练阶段的损失，普通数据用 sft。"},
        "ko": {
            "label": "참조 손실",
            "info": "auto는 데이터셋을 따릅니다. 랭킹이나 태그가 있으면 학습 단계의 손실, 일반 데이터는 sft.",
        },
        "ja": {
            "label": "参照損失",
            "info": "auto はセットに従います。ランキングやタグには学習段階の損失、通常のデータには sft。",
        },
    },
    "ogpsa_basis_device": {
        "en": {"label": "Basis device", "info": "Where the subspace is kept; auto decides by the free memory."},
        "ru": {"label": "Устройство базиса", "info": "Где хранится подпространство; auto решает по свободной памяти."},
        "zh": {"label": "基向量设备", "info": "子空间的存放位置；auto 根据空闲显存决定。"},
        "ko": {"label": "기저 장치", "info": "부분 공간을 보관할 위치. auto는 여유 메모리에 따라 결정합니다."},
        "ja": {"label": "基底のデバイス", "info": "部分空間の保存先。auto は空きメモリに応じて決まります。"},
    },
    "ogpsa_save_state": {
        "en": {
            "label": "Save OGPSA state",
            "info": "Checkpoints hold the subspace, so that a resumed run ends as an uninterrupted one.",
        },
        "ru": {
            "label": "Сохранять состояние OGPSA",
            "info": "Подпространство хранится в контрольных точках: возобновлённый запуск даёт тот же результат.",
        },
        "zh": {"label": "保存 OGPSA 状态", "info": "检查点中保存子空间，使续训结果与不间断训练一致。"},
        "ko": {
            "label": "OGPSA 상태 저장",
            "info": "체크포인트에 부분 공간을 저장하여, 재개한 학습이 중단 없는 학습과 같은 결과를 냅니다.",
        },
        "ja": {
            "label": "OGPSA の状態を保存",
            "info": "チェックポイントに部分空間を保存し、再開後も中断なしの学習と同じ結果になります。",
        },
    },
}

ALERTS = {
    "err_ogpsa_no_dataset": {
        "en": "Please choose at least one general set for OGPSA.",
        "ru": "Пожалуйста, выберите хотя бы один общий набор для OGPSA.",
        "zh": "请为 OGPSA 选择至少一个通用数据集。",
        "ko": "OGPSA에 사용할 일반 데이터셋을 하나 이상 선택하십시오.",
        "ja": "OGPSA の一般データセットを少なくとも一つ選択してください。",
    },
    "err_ogpsa_count": {
        "en": "{} must be a positive integer.",
        "ru": "«{}»: требуется целое положительное число.",
        "zh": "“{}”必须为正整数。",
        "ko": "'{}' 값은 양의 정수여야 합니다.",
        "ja": "「{}」は正の整数でなければなりません。",
    },
    "err_ogpsa_rank": {
        "en": "{} must be 0 or a positive integer.",
        "ru": "«{}»: требуется 0 или целое положительное число.",
        "zh": "“{}”必须为 0 或正整数。",
        "ko": "'{}' 값은 0 또는 양의 정수여야 합니다.",
        "ja": "「{}」は 0 または正の整数でなければなりません。",
    },
    "err_ogpsa_options": {
        "en": "OGPSA cannot run with these options: {}",
        "ru": "OGPSA не может работать с этими параметрами: {}",
        "zh": "OGPSA 无法使用这些参数运行：{}",
        "ko": "이 옵션으로는 OGPSA를 실행할 수 없습니다: {}",
        "ja": "これらの設定では OGPSA を実行できません：{}",
    },
    "info_ogpsa_refresh": {
        "en": "Refreshing the OGPSA subspace at step {}",
        "ru": "Обновление подпространства OGPSA на шаге {}",
        "zh": "正在第 {} 步更新 OGPSA 子空间",
        "ko": "스텝 {}에서 OGPSA 부분 공간을 업데이트하는 중",
        "ja": "ステップ {} で OGPSA 部分空間を更新中",
    },
}


def add_locales(locales: dict[str, Any]) -> None:
    """Add OGPSA's labels to LlamaBoard's table, for all of its languages; English if this module lacks one."""
    for name, texts in LOCALES.items():
        locales[name] = {lang: texts.get(lang, texts["en"]) for lang in locales["galore_tab"]}


def alert(name: str, lang: str, *values: Any) -> str:
    """Return a message in a language of LlamaBoard."""
    return ALERTS[name].get(lang, ALERTS[name]["en"]).format(*values)


def label(name: str, lang: str) -> str:
    """Return the label of an option in a language of LlamaBoard."""
    return LOCALES[name].get(lang, LOCALES[name]["en"])["label"]
